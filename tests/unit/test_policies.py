"""Eviction policies against brute force and against the independent reference; ties; column sums in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import Settings, policies
from vllm_calidrop.algorithm.policies import POLICIES, Needs, Policy, ScoreInputs, Selection
from vllm_calidrop.algorithm.policies.h2o import QUERY_TILE, add_column_sums
from vllm_calidrop.algorithm.shape import KVShape

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 8
SCALE = HEAD_DIM**-0.5
SEEDS = st.integers(0, 2**31)


def random_prompt(seed: int, prompt_len: int) -> tuple[Tensor, Tensor]:
    """queries [P, Hq, D] and keys [H, P, D] as a worker sees them."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn((prompt_len, KV_HEADS * GROUP, HEAD_DIM), generator=generator)
    return queries * 2, torch.randn((KV_HEADS, prompt_len, HEAD_DIM), generator=generator)


def column_sums(queries: Tensor, keys: Tensor, chunks: list[int] | None = None) -> Tensor:
    """As a prefill in chunks of these lengths computes them: each chunk knows the keys up to its own end."""
    sums = torch.zeros(keys.shape[:2])
    start = 0
    for length in chunks or [len(queries)]:
        end = min(start + length, len(queries))
        if start < end:
            add_column_sums(sums, queries[start:end], keys[:, :end], start, SCALE)
        start = end
    assert start == len(queries)
    return sums


def inputs_for(queries: Tensor, keys: Tensor, asked: Settings) -> ScoreInputs:
    window_sums = torch.zeros(keys.shape[:2])
    add_column_sums(window_sums, queries[-asked.window :], keys, len(queries) - asked.window, SCALE)
    return ScoreInputs(
        prompt_len=keys.shape[1],
        num_kv_heads=keys.shape[0],
        budget=asked.budget,
        window=asked.window,
        sinks=asked.sinks,
        pool_kernel=asked.kv_pool_kernel,
        scale=SCALE,
        device=keys.device,
        window_sums=window_sums,
        column_sums=column_sums(queries, keys),
    )


def weights_by_hand(queries: Tensor, keys: Tensor) -> Tensor:
    """Causal softmax attention, float64 [H, G, P, P], one query after the other."""
    prompt_len = len(queries)
    weights = torch.zeros((KV_HEADS, GROUP, prompt_len, prompt_len), dtype=torch.float64)
    for position in range(prompt_len):
        for head in range(KV_HEADS * GROUP):
            kv_head = head // GROUP
            logits = keys[kv_head, : position + 1].double() @ queries[position, head].double() * SCALE
            weights[kv_head, head % GROUP, position, : position + 1] = logits.softmax(-1)
    return weights


@st.composite
def asked(draw: Any) -> tuple[Settings, int]:
    """Settings with every budget, odd ones included, and a prompt longer than it."""
    budget = draw(st.integers(1, 40))
    settings = Settings(
        kv_budget=budget,
        kv_policy=draw(st.sampled_from(["snapkv", "h2o", "streaming_llm"])),
        kv_window=draw(st.none() | st.integers(1, budget)),
        kv_sinks=draw(st.none() | st.integers(0, budget)),
        kv_pool_kernel=draw(st.sampled_from([1, 3, 5, 7])),
    )
    return settings, budget + draw(st.integers(1, 60))


@settings(max_examples=150)
@given(asked(), SEEDS, st.data())
def test_selection_equals_the_reference(case: tuple[Settings, int], seed: int, data: st.DataObject) -> None:
    """Kept and stored sets, for any number of stored tokens; fp32 may decide where the reference's scores touch."""
    settings, prompt_len = case
    queries, keys = random_prompt(seed, prompt_len)
    stored = data.draw(st.integers(0, prompt_len - settings.budget))
    selection = POLICIES[settings.kv_policy].select(inputs_for(queries, keys, settings), stored)
    grouped = queries.view(prompt_len, KV_HEADS, GROUP, HEAD_DIM).permute(1, 2, 0, 3)
    expected = policies.select(grouped.double(), keys.double(), SCALE, settings)
    assume(expected.gap(expected.picked) > 1e-5 and expected.gap(expected.picked + stored) > 1e-5)
    assert torch.equal(selection.kept, expected.kept)
    assert torch.equal(selection.evicted, expected.evicted[:, :stored].sort(-1).values)


@given(asked(), SEEDS)
def test_kept_and_evicted_share_the_prompt(case: tuple[Settings, int], seed: int) -> None:
    settings, prompt_len = case
    selection = POLICIES[settings.kv_policy].select(
        inputs_for(*random_prompt(seed, prompt_len), settings), prompt_len - settings.budget
    )
    for kept, evicted in zip(*selection, strict=True):
        assert len(kept) == settings.budget
        assert kept.tolist() == sorted(kept.tolist()) and evicted.tolist() == sorted(evicted.tolist())
        assert sorted([*kept.tolist(), *evicted.tolist()]) == list(range(prompt_len))


# each policy by hand


def test_snapkv_by_hand() -> None:
    """Votes of the window's queries, pooled by a loop that counts the zero padding."""
    prompt_len, budget, window, kernel = 41, 15, 6, 5
    queries, keys = random_prompt(7, prompt_len)
    settings = Settings(kv_budget=budget, kv_window=window, kv_pool_kernel=kernel)
    importance = POLICIES["snapkv"].importance(inputs_for(queries, keys, settings))
    votes = weights_by_hand(queries, keys)[:, :, -window:, :-window].sum(2).mean(1)
    for head in range(KV_HEADS):
        padded = [0.0] * (kernel // 2) + votes[head].tolist() + [0.0] * (kernel // 2)
        pooled = [sum(padded[i : i + kernel]) / kernel for i in range(prompt_len - window)]
        torch.testing.assert_close(importance[head, :-window].double(), torch.tensor(pooled, dtype=torch.float64))
    assert (importance[:, -window:] == torch.inf).all()


@pytest.mark.parametrize(("budget", "recent"), [(1, 1), (2, 1), (7, 4), (8, 4)])
def test_h2o_by_hand(budget: int, recent: int) -> None:
    """An odd budget gives the recent half the extra token."""
    prompt_len = 30
    queries, keys = random_prompt(8, prompt_len)
    selection = POLICIES["h2o"].select(inputs_for(queries, keys, Settings(kv_budget=budget)), 0)
    received = weights_by_hand(queries, keys).sum(2).mean(1)
    for head in range(KV_HEADS):
        ranked = sorted(range(prompt_len - recent), key=lambda position: -received[head, position])
        assert selection.kept[head].tolist() == sorted(ranked[: budget - recent]) + list(
            range(prompt_len - recent, prompt_len)
        )


@pytest.mark.parametrize(
    ("budget", "sinks", "stored", "kept", "evicted"),
    [
        (5, 2, 3, [0, 1, 7, 8, 9], [4, 5, 6]),
        (5, 0, 0, [5, 6, 7, 8, 9], []),
        (5, 5, 5, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]),
        (1, 0, 9, [9], list(range(9))),
    ],
)
def test_streaming_llm_by_hand(budget: int, sinks: int, stored: int, kept: list[int], evicted: list[int]) -> None:
    inputs = inputs_for(*random_prompt(0, 10), Settings(kv_budget=budget, kv_sinks=sinks))
    selection = POLICIES["streaming_llm"].select(inputs, stored)
    assert selection.kept.tolist() == [kept] * KV_HEADS
    assert selection.evicted.tolist() == [evicted] * KV_HEADS


# ties


class Given(Policy):
    """A policy whose importance is given."""

    name = "given"

    def __init__(self, importance: list[float]) -> None:
        self._importance = torch.tensor([importance])

    def importance(self, inputs: ScoreInputs) -> Tensor:
        return self._importance


def select_by(importance: list[float], budget: int, stored: int) -> Selection:
    return Given(importance).select(given_inputs(len(importance), budget), stored)


def given_inputs(prompt_len: int, budget: int) -> ScoreInputs:
    return ScoreInputs(
        prompt_len=prompt_len,
        num_kv_heads=1,
        budget=budget,
        window=1,
        sinks=0,
        pool_kernel=1,
        scale=1.0,
        device=torch.device("cpu"),
    )


@given(st.lists(st.sampled_from([0.0, 1.0, float("inf")]), min_size=2, max_size=200), st.data())
def test_ties_go_to_the_lower_position(importance: list[float], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(importance) - 1))
    stored = data.draw(st.integers(0, len(importance) - budget))
    selection = select_by(importance, budget, stored)
    ranked = sorted(range(len(importance)), key=lambda position: (-importance[position], position))
    assert selection.kept.tolist() == [sorted(ranked[:budget])]
    assert selection.evicted.tolist() == [sorted(ranked[budget : budget + stored])]


def test_snapkv_keeps_the_first_of_equal_tokens() -> None:
    """All keys equal: every token before the window gets the same vote; pooling takes some from the edges."""
    queries, keys = random_prompt(3, 40)
    keys[:] = keys[:, :1]
    inputs = inputs_for(queries, keys, Settings(kv_budget=12, kv_window=4, kv_pool_kernel=1))
    selection = POLICIES["snapkv"].select(inputs, 6)
    assert selection.kept.tolist() == [list(range(8)) + list(range(36, 40))] * KV_HEADS
    assert selection.evicted.tolist() == [list(range(8, 14))] * KV_HEADS


def test_a_budget_that_evicts_nothing_is_not_for_a_policy() -> None:
    for budget in (0, 3, 4):
        with pytest.raises(AssertionError):
            select_by([1.0, 2.0, 3.0], budget, 0)


@pytest.mark.parametrize("importance", [torch.zeros(1, 4), torch.zeros(3), torch.zeros(1, 3, dtype=torch.float64)])
def test_a_policy_that_breaks_the_contract_is_named(importance: Tensor) -> None:
    policy = Given([])
    policy._importance = importance
    with pytest.raises(ValueError, match=r"the policy given gave .* instead of torch.float32 \(1, 3\)"):
        policy.select(given_inputs(3, 2), 0)


def test_needs_that_nobody_knows_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="the policy Wrong must say what it needs as Needs, not 'keys'"):

        class Wrong(Given):
            needs = "keys"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("needs", "num_bytes", "hit"),
    [
        (Needs.NOTHING, 0, 80),
        (Needs.KEYS, 0, 80),
        (Needs.WINDOW_QUERIES, 3 * 32 * 8 * 64 * 2, 64),
        (Needs.WINDOW_SUMS, 3 * 32 * 8 * 64 * 2, 64),
        (Needs.COLUMN_SUMS, 3 * 2 * 100 * 4, 0),
        (Needs.WINDOW_SUMS | Needs.COLUMN_SUMS | Needs.KEYS, 3 * 32 * 8 * 64 * 2 + 3 * 2 * 100 * 4, 0),
    ],
)
def test_what_follows_from_needs(needs: Needs, num_bytes: int, hit: int) -> None:
    """Of a prompt of 100 tokens: its window of 32 queries is computed, and blocks from the budget's on are its own."""
    policy = Given([])
    policy.needs = needs  # type: ignore[misc]
    shape = KVShape(num_layers=3, num_query_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    assert policy.prefill_bytes(shape, window=32, prompt_len=100) == num_bytes
    assert policy.allowed_hit(96, prompt_len=100, budget=10, window=32, block_size=16) == hit


# column sums


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 60), st.lists(st.integers(0, 30), max_size=6))
def test_column_sums_of_any_chunks_are_those_of_the_whole(seed: int, prompt_len: int, cuts: list[int]) -> None:
    queries, keys = random_prompt(seed, prompt_len)
    chunked = column_sums(queries, keys, [*cuts, prompt_len])
    torch.testing.assert_close(chunked, column_sums(queries, keys), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_len", [QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 2 * QUERY_TILE + 37])
@pytest.mark.parametrize("chunk", [1, 100, QUERY_TILE, 10**6])
def test_column_sums_around_the_edges_of_a_tile(prompt_len: int, chunk: int) -> None:
    """Against all weights at once, in float64; every query gives away exactly one."""
    queries, keys = random_prompt(prompt_len, prompt_len)
    sums = column_sums(queries, keys, [chunk] * -(-prompt_len // chunk))
    grouped = queries.view(prompt_len, KV_HEADS, GROUP, HEAD_DIM).permute(1, 2, 0, 3)
    expected = policies.causal_weights(grouped.double(), keys.double(), SCALE).sum(2).mean(1)
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums.sum(-1), torch.full((KV_HEADS,), float(prompt_len)))


def test_column_sums_by_hand_and_of_keys_beyond_the_chunk() -> None:
    """Keys that were given but lie after the chunk's last query are not looked at."""
    queries, keys = random_prompt(5, 20)
    expected = weights_by_hand(queries, keys)[:, :, 4:9].sum(2).mean(1)
    sums = torch.zeros(KV_HEADS, 20)
    add_column_sums(sums, queries[4:9], keys, 4, SCALE)
    torch.testing.assert_close(sums.double(), expected, atol=1e-5, rtol=1e-5)
    assert (sums[:, 9:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    queries, keys = (tensor.to(dtype) for tensor in random_prompt(2, 50))
    for name, policy in POLICIES.items():
        inputs = inputs_for(queries, keys, Settings(kv_budget=20, kv_policy=name))
        wide = inputs_for(queries.float(), keys.float(), Settings(kv_budget=20, kv_policy=name))
        assert policy.importance(inputs).dtype == torch.float32
        torch.testing.assert_close(policy.importance(inputs), policy.importance(wide))
