"""Tokens, kept sets and per-layer counts of the engine against the independent reference (fp32)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.cases import (
    CALIBRATION,
    POLICIES,
    CachedReference,
    ask_of,
    covering_combinations,
    every_combination,
    prompt_of,
)
from tests.engine.harness import Ask, Engine, assert_equal_to_reference

pytestmark = pytest.mark.engine
ENGINES = ("block32-whole", "block16-chunk100", "block128-chunk64")
WINDOW = 32


@pytest.mark.parametrize("name", ENGINES)
def test_pairwise(name: str, engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    """Every pair of policy, budget, thresholds, gate and context; all in one batch, so also with each other."""
    asks = [ask_of(combination, seed) for seed, combination in enumerate(covering_combinations())]
    assert_equal_to_reference(asks, engine_named(name).ask(asks), [reference(ask) for ask in asks])


def test_every_branch_is_taken(reference: CachedReference) -> None:
    """The cases above prove little unless the gate recomputes, merges and does neither."""
    results = [reference(ask_of(combination, seed)) for seed, combination in enumerate(covering_combinations())]
    for name in ("recomputes", "merges", "plain"):
        assert sum(sum(getattr(result, name)) for result in results) > 50, name


def test_chunk_boundary_at_each_offset_inside_the_window(
    engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """Chunks of 64: a prompt of 256 + k tokens ends with a chunk of k, down to a single token."""
    engine = engine_named("block128-chunk64")
    asks = [
        Ask(prompt_of(256 + last, seed=last)[-(256 + last) :], 8, {"kv_budget": 64, "kv_policy": "snapkv"})
        for last in range(1, WINDOW + 2)
    ]
    assert {len(ask.prompt) % 64 for ask in asks} >= set(range(1, WINDOW + 1))
    assert_equal_to_reference(asks, engine.ask_alone(asks), [reference(ask) for ask in asks])


@pytest.mark.parametrize("policy", POLICIES)
def test_calibration_size_and_own_settings(
    policy: str, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """Only the most important evicted tokens are stored; windows, sinks and kernels of the request's own."""
    sizes = ({"kv_calibration_size": size} for size in (0, 1, 100, 5000))
    own = ({"kv_window": 7, "kv_pool_kernel": 1}, {"kv_sinks": 0}, {"kv_window": 48, "kv_sinks": 48})
    asks = [
        Ask(prompt_of(400, seed), 12, {"kv_policy": policy, "kv_budget": 48, **settings})
        for seed, settings in enumerate([*sizes, *own])
    ]
    assert_equal_to_reference(asks, engine_named("block32-whole").ask(asks), [reference(ask) for ask in asks])


@pytest.mark.parametrize("budget", [1, 2, 3, 31])
def test_tiny_budgets(budget: int, engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    asks = [
        Ask(prompt_of(150, seed), 10, {"kv_policy": policy, "kv_budget": budget, **calibration})
        for seed, (policy, calibration) in enumerate((p, c) for p in POLICIES for c in CALIBRATION[:2])
    ]
    assert_equal_to_reference(asks, engine_named("block16-chunk100").ask(asks), [reference(ask) for ask in asks])


def test_prompts_around_the_budget(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    """P - B from below zero over one and a block: nothing evicted, one token evicted, g on a block's edge."""
    asks = [
        Ask(prompt_of(200, seed=7)[:length], 10, {"kv_budget": 64, "kv_policy": policy})
        for length in (40, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129)
        for policy in POLICIES
    ]
    assert_equal_to_reference(asks, engine_named("block32-whole").ask(asks), [reference(ask) for ask in asks])


@pytest.mark.full
@pytest.mark.parametrize("chunk", [64, 100, 4096])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_whole_matrix(block_size: int, chunk: int, reference: CachedReference) -> None:
    from tests.engine.cases import MODEL

    engine = Engine(MODEL, block_size=block_size, max_num_batched_tokens=chunk)
    asks = [ask_of(combination, seed) for seed, combination in enumerate(every_combination())]
    try:
        answers = engine.ask(asks)
        engine.assert_nothing_in_use()
    finally:
        engine.close()
    assert_equal_to_reference(asks, answers, [reference(ask) for ask in asks])
