"""`calidrop-server plan`: the arithmetic of what fits; tests/engine/test_plan.py holds it against a real engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_memory import Engine
from vllm_calidrop.evicted.codecs import CODECS, codec_of
from vllm_calidrop.memory import ModelShape, swap_block_bytes
from vllm_calidrop.scheduler.build import size_pools
from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings
from vllm_calidrop.worker.room import leave_room, leave_room_on_device
from vllm_calidrop_server.plan import PerSequence, Workload, fit_budget, fit_full
from vllm_calidrop_server.plan_command import main, parser, plan_of

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def plan(*arguments: Any) -> Any:
    return plan_of(parser().parse_args([str(argument) for argument in arguments]))


def test_llama_3_8b_by_hand(llama: str) -> None:
    """128 KiB of KV a token: 32 layers x 8 KV heads x (K and V of 128) x 2 bytes."""
    made = plan(llama, "--context", 8192, "--output", 512, "--budget", 1024, "--concurrency", 32, "--kv-memory", 40)
    token = 32 * 8 * 2 * 128 * 2
    assert made.block_bytes == 16 * token
    assert made.needed_full == (32 * 544 + 1) * made.block_bytes
    # 8,704 tokens in blocks, less the 448 whole blocks that the 7,168 evicted tokens fill; another's prompt is whole.
    assert (made.one.full_blocks, made.one.budget_blocks, made.one.swap_blocks) == (544, 544 - 448, 56)
    assert made.needed_budget == (512 + 31 * (96 + 1) + 1) * made.block_bytes
    assert made.swap_bytes == 33 * 7168 * token
    assert made.sketch_bytes == made.buffer_bytes == 0
    assert made.fit_full == made.pool_blocks // 544 and made.fit_budget > 5 * made.fit_full
    paged = plan(
        llama, "--context", 8192, "--budget", 1024, "--concurrency", 32, "--set", "kv_recall=pages", "--device", "cpu"
    )
    assert paged.one.sketch_blocks == 56 and paged.sketch_bytes > 0


def test_a_rank_holds_its_heads(llama: str) -> None:
    whole = plan(llama, "--context", 8192, "--budget", 1024, "--concurrency", 8)
    halves = plan(llama, "--context", 8192, "--budget", 1024, "--concurrency", 8, "--tensor-parallel-size", 2)
    assert halves.needed_budget * 2 == whole.needed_budget and halves.swap_bytes * 2 == whole.swap_bytes
    sixteen = plan(llama, "--context", 8192, "--budget", 1024, "--concurrency", 8, "--tensor-parallel-size", 16)
    assert sixteen.shape.num_kv_heads == 1 and sixteen.shape.num_query_heads == 2


@given(st.integers(1, 5000), st.integers(0, 700), st.integers(1, 5000), st.sampled_from([1, 16, 32, 128]))
def test_blocks_of_a_sequence(prompt: int, output: int, budget: int, size: int) -> None:
    settings = RequestSettings(kv_budget=budget)
    shape = ModelShape(1, 1, 1, 64, torch.bfloat16, 10000)
    one = PerSequence.of(Workload(prompt, output, 1, size, settings), shape)
    touched = {token // size for token in range(max(0, prompt - budget), prompt + output)}
    assert one.budget_blocks == len(touched)
    assert one.swap_blocks * 128 >= max(0, prompt - budget) > (one.swap_blocks - 1) * 128
    assert one.full_blocks * size >= prompt + output > (one.full_blocks - 1) * size


@given(st.integers(1, 3000), st.integers(0, 500), st.integers(1, 1000), st.integers(1, 99), st.integers(-1, 1))
def test_what_is_needed_is_what_fits(prompt: int, output: int, budget: int, concurrency: int, more: int) -> None:
    made = plan(
        *"--layers 1 --query-heads 1 --kv-heads 1 --head-dim 8 --context".split(), prompt, "--output", output,
        "--budget", budget, "--concurrency", concurrency,
    )  # fmt: skip
    for needed, fit in ((made.needed_full, fit_full), (made.needed_budget, fit_budget)):
        blocks = needed // made.block_bytes
        assert fit(made.one, blocks) == concurrency
        assert fit(made.one, blocks - 1) == concurrency - 1


@pytest.mark.parametrize(
    ("changed", "swap_blocks"),
    [
        ("--set kv_calibration=false", 0),
        ("--set kv_calibration_size=0", 0),
        ("--set kv_calibration_size=200", 2),
        ("--set kv_policy=full", 0),
        ("--set kv_policy=h2o", 7),
    ],
)
def test_settings_count(llama: str, changed: str, swap_blocks: int) -> None:
    made = plan(llama, *"--context 960 --budget 64 --concurrency 2".split(), *changed.split())
    assert made.one.swap_blocks == swap_blocks
    assert (made.one.budget_blocks == made.one.full_blocks) == ("full" in changed)


def test_the_kv_pool_is_what_the_engine_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """leave_room is what sizes vLLM's KV pool; on CPU it takes the swap pool from the same memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 2**30))
    numbers = "--layers 3 --query-heads 8 --kv-heads 2 --head-dim 64 --dtype float32 --block-size 32".split()
    load = "--context 2000 --output 48 --budget 64 --concurrency 16 --kv-memory 10 --set kv_recall=pages".split()
    made = plan(*numbers, *load, "--device", "cpu")
    engine = Engine(**made.server_settings)
    left = leave_room(engine.config, engine.worker, 10 * 2**30)
    assert left // made.block_bytes == made.pool_blocks
    assert size_pools(engine.config, engine.kv_cache_config(1000)).swap_blocks == 17 * made.one.swap_blocks


def test_on_a_gpu_the_swap_pool_is_the_hosts() -> None:
    """As leave_room_on_device has it; recall by pages is refused there."""
    numbers = "--layers 3 --query-heads 8 --kv-heads 2 --head-dim 64 --dtype bfloat16 --block-size 32".split()
    load = "--context 2000 --output 48 --budget 64 --concurrency 16 --kv-memory 10".split()
    made = plan(*numbers, *load, "--max-num-batched-tokens", "2048")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=2048),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
    )
    settings = ServerSettings(**made.server_settings)
    left = leave_room_on_device(made.shape, made.num_slots, settings, config, 10 * 2**30)
    assert left // made.block_bytes == made.pool_blocks
    with pytest.raises(SettingsError, match="recall by pages is refused on a GPU"):
        plan(*numbers, *load, "--set", "kv_recall=pages")


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_takes_fewer_swap_blocks(llama: str, codec: str) -> None:
    made = plan(llama, *"--context 9000 --budget 64 --concurrency 2 --set".split(), f"kv_codec={codec}")
    per_block = codec_of(codec, 128, torch.bfloat16).tokens_per_block
    assert made.one.swap_blocks == -(-(9000 - 64) // per_block)
    assert made.swap_bytes == 3 * made.one.swap_blocks * swap_block_bytes(made.shape)


def test_text_and_json(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [llama, *"--context 8192 --budget 1024 --concurrency 32 --kv-memory 40".split()]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "1.06 GiB  (544 blocks of 16 tokens)" in text and "192.0 MiB  (96 blocks)" in text
    flags = json.loads(text.split("--additional-config ")[1].strip().strip("'"))
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert flags["calidrop"]["swap_bytes"] == told["swap_bytes"] and told["load"]["settings"]["kv_budget"] == 1024


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--context 100 --concurrency 1", "num_hidden_layers"),
        ("MODEL --context 0 --concurrency 1", "context"),
        ("MODEL --context 100 --concurrency 1 --budget 0", "kv_budget"),
        ("MODEL --context 100 --concurrency 1 --set kv_nothing=1", "kv_nothing"),
        ("MODEL --context 100 --concurrency 1 --tensor-parallel-size 3", "3 ranks"),
        ("/nowhere --context 100 --concurrency 1", "/nowhere"),
    ],
)
def test_wrong_arguments_are_named(llama: str, wrong: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong.replace("MODEL", llama).split())
    assert ended.value.code == 2 and named in capsys.readouterr().err
