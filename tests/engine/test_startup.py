"""Fail closed: what is not supported, or does not fit the installed vLLM, stops the start with an error naming it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.engine.cases import ROOT
from vllm_calidrop.compat import SUPPORTED_VLLM, installed_vllm_version
from vllm_calidrop.hooks import on_import, wrap
from vllm_calidrop.hooks.wrap import HookError
from vllm_calidrop.scheduler.spec import CaliDropSpec, refuse_groups
from vllm_calidrop.support import UnsupportedError, refuse_platform

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers, with weights."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def create_config(model: str, backend: str = "CALIDROP", **options: Any) -> Any:
    """The VllmConfig that a server or an `LLM` with these options would be started with."""
    from vllm import EngineArgs

    defaults: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
    return EngineArgs(model=model, attention_backend=backend, **(defaults | options)).create_engine_config()


def start_engine(model: str, **options: Any) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
    return LLM(model, attention_backend="CALIDROP", max_num_seqs=4, **(defaults | options))


# what the configuration says


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache .*fp8"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ({"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "microbatches"),
        ({"runner": "pooling"}, "runner pooling"),
        ({"additional_config": {"calidrop": {"swap_byte": 1}}}, "'swap_byte'.*known are .*swap_bytes"),
        ({"additional_config": {"calidrop": {"swap_bytes": -1}}}, "swap_bytes"),
        ({"additional_config": {"calidrop": {"kv_budget": 0}}}, "kv_budget"),
        ({"additional_config": {"calidrop": {"kv_theta1": 0.9, "kv_theta2": 0.85}}}, "kv_theta1.*kv_theta2"),
        ({"additional_config": {"calidrop": [1]}}, "must be an object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_that_are_refused(llama: str, options: dict[str, Any], named: str) -> None:
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    with pytest.raises(ValueError, match=named) as refusal:
        create_config(llama, **options)
    assert "calidrop" in str(refusal.value)
    create_config(llama, backend="CPU_ATTN", **options)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            transformers.DeepseekV2Config(
                **SIZES | {"num_key_value_heads": 2}, architectures=["DeepseekV2ForCausalLM"], kv_lora_rank=16,
                q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4,
            ),
            "multi-head latent attention",
        ),
        (transformers.MistralConfig(**SIZES, sliding_window=64, architectures=["MistralForCausalLM"]), "sliding"),
        (transformers.Gemma2Config(**SIZES, sliding_window=64, architectures=["Gemma2ForCausalLM"]), "sliding"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_are_refused(tmp_path: Path, config: Any, named: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"attention-backend calidrop does not support.*{named}"):
        create_config(str(tmp_path), dtype="bfloat16")


def test_several_reasons_are_all_named(llama: str) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(Exception, match=r"speculative decoding.*; .*fp8"):
        create_config(llama, speculative_config=speculation, kv_cache_dtype="fp8")


# what only a layer knows


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ({"per_layer_sliding_window": 64}, "sliding-window attention layers"),
        ({"sinks": torch.zeros(2)}, "attention-sink layers"),
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "soft-capped"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_layers_that_are_refused(llama: str, layer: dict[str, Any], named: str) -> None:
    """vLLM's own attention layer, as a model builds it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = create_config(llama)
    with set_current_vllm_config(config):
        Attention(2, 32, 0.1, num_kv_heads=1, cache_config=config.cache_config, prefix="plain")
        with pytest.raises(UnsupportedError, match=named):
            Attention(2, 32, 0.1, num_kv_heads=1, cache_config=config.cache_config, prefix="refused", **layer)


def test_kv_sharing_is_refused() -> None:
    """The one thing of a layer that cannot be built alone: it names another layer."""
    from vllm_calidrop.support import refuse_layer

    plain = dict(sliding_window=-1, sinks=None, alibi_slopes=None, logits_soft_cap=0, kv_cache_dtype="auto")
    refuse_layer(SimpleNamespace(**plain, kv_sharing_target_layer_name=None, attn_type="decoder"))
    with pytest.raises(UnsupportedError, match="KV sharing"):
        refuse_layer(SimpleNamespace(**plain, kv_sharing_target_layer_name="other", attn_type="decoder"))


def test_hybrid_kv_caches_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape: dict[str, Any] = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    ours, other = (SimpleNamespace(kv_cache_spec=kind(**shape)) for kind in (CaliDropSpec, FullAttentionSpec))
    refuse_groups(SimpleNamespace(kv_cache_groups=[ours]))
    with pytest.raises(UnsupportedError, match="FullAttentionSpec"):
        refuse_groups(SimpleNamespace(kv_cache_groups=[ours, other]))
    with pytest.raises(UnsupportedError, match="2 KV-cache groups"):
        refuse_groups(SimpleNamespace(kv_cache_groups=[ours, ours]))


def test_platforms_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    elsewhere = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="tpu")
    monkeypatch.setattr(vllm.platforms, "_current_platform", elsewhere)
    with pytest.raises(UnsupportedError, match="platform tpu"):
        refuse_platform()


def test_cuda_is_said_to_be_untried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import vllm.platforms

    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(vllm.platforms, "_current_platform", cuda)
    refuse_platform()
    assert "tested without a GPU only" in caplog.text


# what only the started engine knows


def test_swap_pool_larger_than_the_memory(llama: str) -> None:
    settings = {"calidrop": {"swap_bytes": 2**50}}
    with pytest.raises(ValueError, match="swap_bytes"):
        start_engine(llama, additional_config=settings)
    with pytest.raises(ValueError, match="swap_bytes"):
        start_engine(llama, additional_config=settings, kv_cache_memory_bytes=2**26)


def test_a_fixed_pool_larger_than_the_memory(llama: str) -> None:
    with pytest.raises(ValueError, match=r"fixed KV pool .*lower --num-gpu-blocks-override"):
        start_engine(llama, num_gpu_blocks_override=10**9)


def test_a_scheduler_that_is_not_vllms(llama: str) -> None:
    class Other:
        pass

    # The configuration is checked while pydantic makes it, which turns a ValueError into its own kind.
    with pytest.raises(ValueError, match=r"does not support: the scheduler .*Other"):
        start_engine(llama, scheduler_cls=Other)


# hooks that do not fit


def assert_tells_symbol_and_versions(error: BaseException, symbol: str) -> None:
    assert symbol in str(error), error
    assert SUPPORTED_VLLM in str(error) and installed_vllm_version() in str(error)


def test_a_module_that_vllm_renamed(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module a hook waits for must exist, or the hook would never come."""
    on_import.require_awaited_modules()
    for name in ("vllm.v1.engine.gone", "vllm.gone.engine.core"):
        with monkeypatch.context() as patch:
            patch.setitem(on_import._finder.waiting, name, [lambda module: None])
            with pytest.raises(Exception, match="cannot hook into vLLM") as refusal:
                create_config(llama)
            assert_tells_symbol_and_versions(refusal.value, f"module {name}")
            create_config(llama, backend="CPU_ATTN")


def test_an_engine_whose_hooks_are_missing(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    from vllm_calidrop.hooks.engine.engine_core import _REQUIRED

    config = create_config(llama)
    for symbol in _REQUIRED:
        assert symbol in wrap._installed
        with monkeypatch.context() as patch:
            patch.delitem(wrap._installed, symbol)
            with pytest.raises(HookError) as refusal:
                EngineCore._initialize_kv_caches(SimpleNamespace(), config)
            assert_tells_symbol_and_versions(refusal.value, symbol)


def test_an_engine_with_another_scheduler_than_ours(llama: str) -> None:
    """The configuration was changed after it was checked: a budget would be without effect."""
    from vllm.v1.engine.core import EngineCore

    config = create_config(llama)
    config.scheduler_config.scheduler_cls = None
    with pytest.raises(HookError) as refusal:
        EngineCore._initialize_kv_caches(SimpleNamespace(), config)
    assert_tells_symbol_and_versions(refusal.value, "Scheduler is used without our methods")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


EVERY_HOOK = """
import contextlib, importlib, inspect, pkgutil, sys, types
from vllm_calidrop import hooks
from vllm_calidrop.hooks import on_import, wrap

# What the hooks want to wrap: asked once, without wrapping.
found = pkgutil.walk_packages(hooks.__path__, f"{hooks.__name__}.")
parts = [importlib.import_module(part.name) for part in found]
wanted = []
for part in parts:
    if hasattr(part, "install"):
        if hasattr(part, "wrap_method"):
            part.wrap_method = lambda *call, part=part: wanted.append((part, *call))
        part.install()
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("of vLLM's CUDA build")  # vllm.platforms.cuda wants it
for name in list(on_import._finder.waiting):
    importlib.import_module(name)
assert not on_import._finder.waiting
for part in parts:
    if hasattr(part, "install") and hasattr(part, "wrap_method"):
        part.wrap_method = wrap.wrap_method

def refused(part, symbol):
    try:
        part.install()
    except wrap.HookError as error:
        assert symbol in str(error) and wrap.SUPPORTED_VLLM in str(error), (symbol, error)
    else:
        raise AssertionError(f"{symbol}: silence")

@contextlib.contextmanager
def without(owner, name):
    raw = vars(owner)[name]
    delattr(owner, name)
    yield
    setattr(owner, name, raw)

for part, owner, name, _, expected in wanted:
    symbol = wrap._symbol_of(owner, name)
    with without(owner, name):
        refused(part, symbol)
        setattr(owner, name, lambda renamed, *others: None)
        refused(part, symbol)
        if len(expected) > 1:
            setattr(owner, name, lambda self, renamed: None)
            refused(part, symbol)
    if inspect.isclass(owner):
        module = sys.modules[owner.__module__]
        with without(module, owner.__name__):
            refused(part, owner.__name__)

hooks.install_engine_hooks()
hooks.install_api_hooks()
symbols = {hook.symbol for hook in wrap.installed_hooks()}
assert symbols == {wrap._symbol_of(owner, name) for _, owner, name, *_ in wanted}
print(*sorted(symbols), sep="\\n")
"""


def test_every_hook_refuses_what_it_does_not_know() -> None:
    """For each wrapped symbol: gone, other parameters, its class gone. Then nothing is wrong, and all are installed."""
    from vllm_calidrop.hooks.engine.engine_core import _REQUIRED

    run = run_python(EVERY_HOOK)
    assert run.returncode == 0, run.stderr[-3000:]
    symbols = run.stdout.split()
    assert {*_REQUIRED, "vllm.platforms.cpu.CpuPlatform.check_and_update_config"} <= set(symbols)
    assert 20 < len(symbols) <= 32, (
        "the wraps are listed in docs/development.md; more of them are a burden at every release"
    )


def test_a_wrap_that_does_not_fit_stops_the_start(llama: str) -> None:
    """The whole way: vLLM changes a signature, the plugin is loaded by vLLM, the user starts an engine."""
    code = (
        "import sys; from vllm.v1.core.sched.scheduler import Scheduler;"
        "Scheduler.update_from_output = lambda self, output: None;"
        "from vllm import LLM;"
        "LLM(sys.argv[1], attention_backend='CALIDROP', skip_tokenizer_init=True, enforce_eager=True)"
    )
    run = run_python(code, llama)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert "HookError" in last and SUPPORTED_VLLM in last
    assert "vllm.v1.core.sched.scheduler.Scheduler.update_from_output takes (self, output)" in last


# other processes


def test_configuration_travels_to_a_process_without_plugins(llama: str, tmp_path: Path) -> None:
    """A spawned engine process unpickles its configuration before it loads plugins."""
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(create_config(llama)))
    code = (
        "import pickle, sys; from pathlib import Path; config = pickle.loads(Path(sys.argv[1]).read_bytes());"
        "backend = config.attention_config.backend; print(backend.name, backend.get_path());"
        "again = pickle.loads(pickle.dumps(config)).attention_config.backend; print(again is backend)"
    )
    run = run_python(code, str(path), VLLM_PLUGINS="")
    assert run.stdout.splitlines()[-2:] == [
        "CALIDROP vllm_calidrop.attention.backend.CaliDropBackend",
        "True",
    ], run.stderr[-3000:]


OWN_CLASSES = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    llm = LLM(sys.argv[1], attention_backend="CALIDROP", dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
              max_num_seqs=4, scheduler_cls="tests.support.own_classes.CountingScheduler",
              worker_extension_cls="tests.support.own_classes.Extension")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False, extra_args={"kv_budget": 8})
    params.extra_args["kv_window"] = 4
    (output,) = llm.generate([{"prompt_token_ids": list(range(10, 110))}], params, use_tqdm=False)
    print(json.dumps({
        "report": output.outputs[0].calidrop, "kv_transfer_params": output.kv_transfer_params,
        "worker": llm.collective_rpc("classes_of_worker")[0],
    }))

if __name__ == "__main__":
    main()
"""


def test_the_users_scheduler_and_worker_extension_go_on_working(llama: str, tmp_path: Path) -> None:
    """In an engine process of its own, which gets their names with the configuration."""
    script = tmp_path / "own_classes.py"
    script.write_text(OWN_CLASSES)
    run = subprocess.run(
        [sys.executable, str(script), llama],
        env=os.environ | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith('{"report"')]  # the engine logs there, too
    answer = json.loads(line)
    assert (answer["report"]["kept"], answer["report"]["evicted"]) == (8, 92)
    assert answer["kv_transfer_params"]["steps"] >= 5, "the user's scheduler ran"
    assert {"Extension", "CompressingWorker", "CPUWorker"} <= set(answer["worker"])


STOCK = """
import json, random, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=4,
          additional_config={"calidrop": {"swap_bytes": 1, "kv_budget": 4}})
random.seed(0)
prompts = [{"prompt_token_ids": [random.randrange(200) for _ in range(length)]} for length in (5, 40, 100, 150)]
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, detokenize=False,
                        extra_args={"kv_budget": 8, "kv_unknown": "is ignored"})
outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
core = llm.llm_engine.engine_core.engine_core
worker = core.model_executor.driver_worker.worker
if "vllm_calidrop" in sys.modules:
    from vllm_calidrop.hooks.wrap import installed_hooks
    assert len(installed_hooks()) > 10
    assert type(core.scheduler).__module__.startswith("vllm.v1.") and type(worker).__module__.startswith("vllm.v1.")
    assert not hasattr(core.scheduler, "calidrop") and not hasattr(worker, "calidrop")
    assert not hasattr(core.scheduler.kv_cache_manager, "calidrop")
    assert all(output.calidrop is None for output in outputs)
    ours = tuple(f"vllm_calidrop.{module}" for module in ("scheduler.ledger", "worker.build", "attention."))
    assert not [name for name in sys.modules if name.startswith(ours)]
print(json.dumps({
    "plugin": "vllm_calidrop" in sys.modules,
    "tokens": [list(output.token_ids) for output in outputs],
    "logprobs": [[sorted((token, of.logprob) for token, of in step.items()) for step in output.logprobs]
                 for output in outputs],
    "blocks": core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
    "specs": [type(group.kv_cache_spec).__name__ for group in core.scheduler.kv_cache_config.kv_cache_groups],
}))
"""


def test_without_the_backend_the_plugin_changes_nothing(llama: str) -> None:
    """Tokens and logprobs of the stock backend, bit for bit, with the plugin and without; settings are ignored."""
    answers = []
    for plugins in ("calidrop", ""):
        run = run_python(STOCK, llama, VLLM_PLUGINS=plugins)
        assert run.returncode == 0, run.stderr[-3000:]
        answers.append(json.loads(run.stdout.splitlines()[-1]))
    assert [answer.pop("plugin") for answer in answers] == [True, False]
    assert answers[0] == answers[1]
    assert answers[0]["specs"] == ["FullAttentionSpec"]
