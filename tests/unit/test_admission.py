"""Admission as arithmetic: what becomes of a prompt by its settings, its length and the room in the pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.scheduler.admission import Decision, allowed_hit, decide, freed_blocks, prefill_bytes
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.settings.request import RequestSettings
from vllm_calidrop.settings.server import ServerSettings, resolve_request
from vllm_calidrop_server.plan import PerSequence, Workload

SHAPE = Shape(num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float16, block_size=16)
NONE, FEW, ROOM = PoolSizes(0, 0, 0), PoolSizes(8, 8, 4), PoolSizes(100, 100, 100)
PAGES = {"kv_recall": "pages", "kv_recall_buffer": 4}


def settings_of(**asked: Any) -> RequestSettings:
    return resolve_request(asked, ServerSettings())


def decided(prompt_len: int, free: PoolSizes = ROOM, sizes: PoolSizes = ROOM, **asked: Any) -> Decision:
    return decide(settings_of(**asked), prompt_len, SHAPE, free, sizes)


@pytest.mark.parametrize(
    ("asked", "mode", "reason"),
    [
        ({}, "full", "no_budget"),
        ({"kv_budget": 100, "kv_policy": "full"}, "full", "policy_full"),
        ({"kv_budget": 1000}, "full", "prompt_within_budget"),
        ({"kv_budget": 100}, "calidrop", None),
        ({"kv_budget": 100, "kv_calibration_size": 0}, "evict", "calibration_off"),
    ],
)
def test_what_the_settings_say(asked: dict[str, Any], mode: str, reason: str | None) -> None:
    decision = decided(1000, **asked)
    assert (decision.mode, decision.reason, decision.is_admission) == (mode, reason, True)
    assert decision.kept + decision.evicted == 1000
    assert decide(None, 1000, SHAPE, ROOM, ROOM).reason == "no_budget"


@pytest.mark.parametrize(
    ("asked", "free", "lacking"),
    [
        ({}, PoolSizes(7, 100, 100), "swap_full"),
        (PAGES, PoolSizes(8, 7, 4), "recall_full"),
        (PAGES, PoolSizes(8, 8, 3), "recall_full"),
        (PAGES, PoolSizes(7, 7, 3), "swap_full"),
    ],
)
def test_what_the_pools_lack(asked: dict[str, Any], free: PoolSizes, lacking: str) -> None:
    """900 evicted tokens take 8 blocks. Who waits or is refused is not admitted, whatever has room by itself."""
    asked = {"kv_budget": 100, **asked}
    assert decided(1000, FEW, FEW, **asked).mode == "calidrop"
    full, evict, wait, reject = (
        decided(1000, free, FEW, **asked, kv_on_full=on_full) for on_full in ("full", "evict", "wait", "reject")
    )
    assert (full.mode, full.reason, full.needs) == ("full", lacking, NONE)
    assert (evict.mode, evict.reason, evict.needs, evict.stored) == ("evict", lacking, NONE, 0)
    assert (wait.mode, reject.mode) == ("wait", "reject") and not wait.is_admission and not reject.is_admission
    assert wait.reason == reject.reason == lacking
    assert decided(1000, free, free, **asked, kv_on_full="wait").reason == "never_fits"


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(list(CODECS)), st.booleans(), st.integers(1, 500))
def test_the_plan_decides_as_the_ledger_does(
    prompt_len: int, budget: int, codec: str, by_pages: bool, outputs: int
) -> None:
    asked = settings_of(kv_budget=budget, kv_codec=codec, **(PAGES if by_pages else {}))
    room = PoolSizes(10**9, 10**9, 10**9)
    decision = decide(asked, prompt_len, SHAPE, room, room)
    model = ModelShape(2, 4, 2, 16, torch.float16, max_model_len=4000)
    one = PerSequence.of(Workload(prompt_len, outputs, 1, SHAPE.block_size, asked), model)
    assert PoolSizes(one.swap_blocks, one.sketch_blocks, one.buffer_pages) == decision.needs
    assert one.full_blocks - one.budget_blocks == decision.first_block == freed_blocks(asked, prompt_len, SHAPE)
    assert decision.first_block * SHAPE.block_size + decision.view_start == decision.evicted
    assert decision.stored == decision.evicted == max(0, prompt_len - budget)


def test_a_read_budget_is_split_over_layers_and_ranks() -> None:
    one_read = SHAPE.codec("none").run_bytes(900)
    decision = decided(1000, kv_budget=100, kv_read_budget=2 * 3 * one_read + 5)
    assert (decision.read_bytes, decision.most_reads) == (one_read, 3)
    by_pages = decided(1000, kv_budget=100, kv_read_budget=10**6, **PAGES)
    assert by_pages.by_pages and by_pages.most_reads == 10**6 // 2 // by_pages.read_bytes


def test_what_follows_only_where_something_is_evicted() -> None:
    for asked in ({}, {"kv_budget": 1000}, {"kv_budget": 10, "kv_policy": "full"}):
        settings = settings_of(**asked)
        assert allowed_hit(settings, 1000, 480, SHAPE) == 480
        assert freed_blocks(settings, 1000, SHAPE) == prefill_bytes(settings, 1000, SHAPE) == 0
    assert allowed_hit(settings_of(kv_budget=900), 1000, 480, SHAPE) == 96
    assert prefill_bytes(settings_of(kv_budget=100, kv_policy="h2o"), 1000, SHAPE) == 2 * 2 * 1000 * 4
