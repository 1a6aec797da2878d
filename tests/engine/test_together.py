"""Features of vLLM that people combine with a budget: with theta1 = 2 each gives the stock backend's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.engine.cases import MODEL, prompt_of
from tests.engine.harness import Ask, Engine

pytestmark = pytest.mark.engine

EXACT = {"kv_budget": 64, "kv_theta1": 2}
# An odd number of tokens per step, requests by priority, prompts of embeddings, and adapters, all at once.
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 67,
    "scheduling_policy": "priority",
    "enable_prompt_embeds": True,
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 64,
}
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((300, 401, 233, 517))]


@pytest.fixture(scope="module")
def stock() -> Iterator[Engine]:
    engine = Engine(MODEL, None, **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ours() -> Iterator[Engine]:
    engine = Engine(MODEL, **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two adapters of rank 8 on queries and values, random and large enough to change the answers; and none."""
    from vllm.lora.request import LoRARequest

    requests: list[Any] = [None]
    with safe_open(Path(MODEL) / "model.safetensors", "pt") as weights:
        names = [name for name in list(weights.keys()) if name.endswith(("q_proj.weight", "v_proj.weight"))]
        shapes = {name: weights.get_slice(name).get_shape() for name in names}
    assert shapes
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"adapter{number}")
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (rows, columns) in shapes.items():
            base = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(8, columns, generator=generator) * columns**-0.5
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.3
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        requests.append(LoRARequest(f"adapter{number}", number, str(folder)))
    return requests


def generate(engine: Engine, prompts: list[Any], settings: dict[str, Any] | None, **options: Any) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=settings)
    outputs = engine.llm.generate(prompts, params, use_tqdm=False, **options)
    if settings:
        assert [output.outputs[0].calidrop["mode"] for output in outputs] == ["calidrop"] * len(prompts)
    return [list(output.outputs[0].token_ids) for output in outputs]


def as_tokens(prompts: list[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def test_priorities_and_an_odd_number_of_tokens_per_step(stock: Engine, ours: Engine) -> None:
    options = {"priority": [3, 0, 2, 1]}
    assert generate(ours, as_tokens(PROMPTS), EXACT, **options) == generate(stock, as_tokens(PROMPTS), None, **options)


def test_two_adapters_and_none_in_one_batch(stock: Engine, ours: Engine, adapters: list[Any]) -> None:
    prompts = as_tokens([PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    chosen = [*adapters, adapters[1]]
    expected = generate(stock, prompts, None, lora_request=chosen)
    assert len({tuple(tokens) for tokens in expected[:3]}) == 3, "the adapters change the answers"
    assert generate(ours, prompts, EXACT, lora_request=chosen) == expected


def test_prompts_of_embeddings(stock: Engine, ours: Engine) -> None:
    with safe_open(Path(MODEL) / "model.safetensors", "pt") as weights:
        (name,) = [name for name in list(weights.keys()) if name.endswith("embed_tokens.weight")]
        table = weights.get_tensor(name).float()
    prompts = [{"prompt_embeds": table[prompt]} for prompt in PROMPTS[:2]]
    expected = generate(stock, prompts, None)
    assert expected == generate(stock, as_tokens(PROMPTS[:2]), None)
    assert generate(ours, prompts, EXACT) == expected


def test_structured_outputs(stock: Engine, ours: Engine) -> None:
    """A choice of two words of the model's language, of which it would have said neither by itself."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    words = [ours.llm.get_tokenizer().decode([token]).strip() for token in PROMPTS[0][:2]]
    found = []
    for engine, settings in ((stock, None), (ours, EXACT)):
        params = SamplingParams(
            temperature=0, max_tokens=4, structured_outputs=StructuredOutputsParams(choice=words), extra_args=settings
        )
        outputs = engine.llm.generate(as_tokens(PROMPTS), params, use_tqdm=False)
        found.append([output.outputs[0].text.strip() for output in outputs])
    assert found[0] == found[1] and set(found[1]) <= set(words)


def test_the_prefix_cache_is_reset_while_compressed_requests_run(stock: Engine, ours: Engine) -> None:
    expected = generate(stock, as_tokens(PROMPTS), None)
    for index, prompt in enumerate(PROMPTS):
        ours.submit(f"reset{index}", Ask(prompt, 16, EXACT))
    finished: dict[str, list[int]] = {}
    resets = []
    for number, outputs in enumerate(ours.steps()):
        if number % 5 == 4:
            resets.append(ours.llm.llm_engine.reset_prefix_cache())
        for output in outputs:
            if output.finished:
                finished[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
    assert resets and [finished[f"reset{index}"] for index in range(len(PROMPTS))] == expected
    assert ours.llm.llm_engine.reset_prefix_cache(), "nothing is held when all have ended"
    assert generate(ours, as_tokens(PROMPTS), EXACT) == expected


def test_sleep_and_wake(ours: Engine) -> None:
    """vLLM's CPU platform has no sleep mode: it says so at the start, before anything of ours could be lost."""
    with pytest.raises(ValueError, match=r"[Ss]leep mode"):
        Engine(MODEL, enable_sleep_mode=True)
