"""`calidrop-server plan` against real engines: the sizes they log at start-up, and how many sequences run at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.cases import MODEL, prompt_of
from tests.engine.harness import Ask, Engine
from vllm_calidrop.scheduler.build import logger
from vllm_calidrop_server.plan import Plan, fit_budget, fit_full
from vllm_calidrop_server.plan_command import parser, plan_of

pytestmark = pytest.mark.engine

LOGGED = re.compile(
    r"swap pool (?P<swap_gib>\S+) GiB \((?P<swap>\d+) blocks\) per rank, KV pool (?P<kv_gib>\S+) GiB, "
    r"state table (?P<state>\S+) MiB, prefill state up to (?P<prefill>\S+) MiB, scratch up to (?P<scratch>\S+) MiB; "
    r"recall by pages: sketches (?P<sketch_mib>\S+) MiB \((?P<sketch>\d+) blocks\), "
    r"page buffers (?P<buffer_mib>\S+) MiB \((?P<buffer>\d+) pages\), means (?P<means>\S+) MiB"
)


def planned(*arguments: object) -> Plan:
    return plan_of(parser().parse_args([MODEL, *(str(argument) for argument in arguments)]))


def test_an_engine_logs_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_CPU_KVCACHE_SPACE=1 is a KV pool of fixed size. The flags are those that the plan prints."""
    plan = planned(
        *"--context 900 --output 100 --budget 64 --concurrency 12 --block-size 32 --max-model-len 1152".split(),
        *"--max-num-seqs 20 --dtype float32 --no-async-scheduling --kv-pool 1 --device cpu".split(),
        *"--set kv_recall=pages --set kv_recall_buffer=4".split(),
    )
    options = {"max_num_seqs": 20, "num_gpu_blocks_override": None, "async_scheduling": False}
    lines: list[str] = []
    # Starting an engine resets handlers and levels of all loggers: what is said is noted where it is said.
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    engine = Engine(MODEL, additional_config={"calidrop": plan.server_settings}, **options)
    (line,) = {line for line in lines if "swap pool" in line}
    logged = LOGGED.search(line)
    assert logged is not None, line
    one = plan.one
    assert int(logged["swap"]) == 13 * one.swap_blocks and int(logged["sketch"]) == 13 * one.sketch_blocks
    assert int(logged["buffer"]) == 13 * one.buffer_pages == 13 * 4
    names = {"state": "state_table", "prefill": "prefill_state", "scratch": "scratch", "means": "recall"}
    told = {name: plan.beside[purpose] for name, purpose in names.items()}
    told |= {"sketch_mib": plan.sketch_bytes, "buffer_mib": plan.buffer_bytes}
    assert {name: logged[name] for name in told} == {name: f"{size / 2**20:.1f}" for name, size in told.items()}
    assert engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == plan.pool_blocks
    assert engine.worker.calidrop.table.query.shape[1] == plan.num_slots
    engine.close()


def test_as_many_run_at_once_as_planned(engine_named: Callable[[str], Engine]) -> None:
    """61 blocks of 32 tokens: the full prompts run three at a time, the compressed ones at least as planned."""
    engine = engine_named("small-pool")
    load = "--context 512 --output 60 --budget 64 --concurrency 9 --block-size 32 --dtype float32".split()
    one = planned(*load).one
    full, budget = fit_full(one, 61), fit_budget(one, 61)
    assert (full, budget) == (3, 9)
    for settings, fits in (({}, full), ({"kv_budget": 64, "kv_policy": "streaming_llm"}, budget)):
        answers = engine.ask([Ask(prompt_of(512, seed), 60, settings) for seed in range(2 * budget)])
        assert not any(answer.preempted_at for answer in answers)
        assert engine.max_running >= fits
        if not settings:
            assert engine.max_running == fits


def test_the_served_model_by_its_folder() -> None:
    config = json.loads((Path(MODEL) / "config.json").read_text())
    plan = planned("--context", 100, "--concurrency", 1)
    assert (plan.shape.num_layers, plan.shape.num_kv_heads) == (
        config["num_hidden_layers"],
        config["num_key_value_heads"],
    )
