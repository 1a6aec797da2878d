"""Attention states, their merge and the gate, against float64 softmax and against the paper's branches one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Gate, attention_state, cosine, decide, merge_states

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
SEEDS = st.integers(0, 2**31)


def random_qkv(seed: int, tokens: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """query [2, 3, 8], keys and values [2, tokens, 8]: two KV heads of three query heads."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((2, 3, 8), generator=generator) * spread
    keys, values = torch.randn((2, 2, tokens, 8), generator=generator)
    return query, keys * spread, values


def softmax64(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> AttentionState:
    """The definition, in float64: a plain softmax and a plain logarithm of a sum."""
    logits = scale * query.double() @ keys.double().transpose(-1, -2)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(-1)
    return AttentionState((weights / total.unsqueeze(-1)) @ values.double(), total.log() + top.squeeze(-1))


def assert_close(state: AttentionState, expected: AttentionState) -> None:
    """Within TOLERANCE, or what float32's rounding of the largest logits (about lse) does to their exponentials."""
    assert state.out.dtype == state.lse.dtype == torch.float32
    largest = expected.lse[expected.lse.isfinite()].abs().max() if expected.lse.isfinite().any() else 0.0
    rounding = 4 * torch.finfo(torch.float32).eps * float(largest)
    tolerance = {name: max(value, rounding) for name, value in TOLERANCE.items()}
    torch.testing.assert_close(state.out.double(), expected.out.double(), **tolerance)
    torch.testing.assert_close(state.lse.double(), expected.lse.double(), **TOLERANCE)


def empty_state() -> AttentionState:
    return AttentionState(torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf))


# attention_state


@given(SEEDS, st.integers(1, 40), st.sampled_from([0.01, 0.35, 3.0]), st.sampled_from([0.1, 1.0, 6.0]))
def test_state_is_the_softmax(seed: int, tokens: int, scale: float, spread: float) -> None:
    query, keys, values = random_qkv(seed, tokens, spread)
    assert_close(attention_state(query, keys, values, scale), softmax64(query, keys, values, scale))


def test_state_of_logits_beyond_the_range_of_exp() -> None:
    query, keys, values = random_qkv(0, 9, spread=30.0)
    assert (query @ keys.transpose(-1, -2)).abs().max() > 500
    assert_close(attention_state(query, keys, values, 1.0), softmax64(query, keys, values, 1.0))


@given(SEEDS, st.lists(st.booleans(), min_size=1, max_size=30), st.sampled_from([float("nan"), float("inf"), 1e38]))
def test_invalid_columns_change_nothing_whatever_they_hold(seed: int, valid: list[bool], garbage: float) -> None:
    query, keys, values = random_qkv(seed, len(valid))
    mask = torch.tensor(valid)
    keys[:, ~mask] = garbage
    values[:, ~mask] = -garbage
    state = attention_state(query, keys, values, 0.35, mask.expand(2, -1))
    if any(valid):
        assert_close(state, softmax64(query, keys[:, mask], values[:, mask], 0.35))
    else:
        assert torch.equal(state.out, empty_state().out)
        assert torch.equal(state.lse, empty_state().lse)


def test_rows_have_their_own_valid_columns() -> None:
    query, keys, values = random_qkv(1, 6)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    state = attention_state(query, keys, values, 0.35, valid)
    for row, tokens in enumerate((6, 2)):
        expected = softmax64(query[row], keys[row, :tokens], values[row, :tokens], 0.35)
        assert_close(AttentionState(state.out[row], state.lse[row]), expected)


def test_state_of_no_columns_at_all() -> None:
    query, keys, values = random_qkv(0, 1)
    state = attention_state(query, keys[:, :0], values[:, :0], 0.35)
    assert torch.equal(state.out, empty_state().out)
    assert torch.equal(state.lse, empty_state().lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    query, keys, values = (tensor.to(dtype) for tensor in random_qkv(3, 50))
    assert_close(attention_state(query, keys, values, 0.35), softmax64(query, keys, values, 0.35))


# merge_states


@settings(max_examples=60)
@given(SEEDS, st.lists(st.integers(0, 3), min_size=1, max_size=30), st.permutations(range(4)))
def test_merged_states_of_any_split_are_the_state_of_the_union(seed: int, part: list[int], order: list[int]) -> None:
    """Parts may be empty, hold tokens in any order, and be merged in any order."""
    query, keys, values = random_qkv(seed, len(part), spread=2.0)
    part_of_token = torch.tensor(part)
    merged = empty_state()
    for index in order:
        mine = part_of_token == index
        merged = merge_states(merged, attention_state(query, keys[:, mine], values[:, mine], 0.35))
    assert_close(merged, softmax64(query, keys, values, 0.35))


@given(SEEDS, st.integers(1, 10), st.integers(1, 10))
def test_merge_does_not_care_which_comes_first(seed: int, left: int, right: int) -> None:
    query, keys, values = random_qkv(seed, left + right)
    a = attention_state(query, keys[:, :left], values[:, :left], 0.35)
    b = attention_state(query, keys[:, left:], values[:, left:], 0.35)
    for forth, back in zip(merge_states(a, b), merge_states(b, a)):
        torch.testing.assert_close(forth, back, rtol=0, atol=1e-6)


def test_the_empty_set_changes_nothing_to_the_bit() -> None:
    query, keys, values = random_qkv(4, 12)
    state = attention_state(query, keys, values, 0.35)
    for merged in (merge_states(state, empty_state()), merge_states(empty_state(), state)):
        assert torch.equal(merged.out, state.out)
        assert torch.equal(merged.lse, state.lse)
    nothing = merge_states(empty_state(), empty_state())
    assert torch.equal(nothing.out, empty_state().out)
    assert torch.equal(nothing.lse, empty_state().lse)


@pytest.mark.parametrize("shift", [-1e4, -200.0, 200.0, 1e4])
def test_merge_of_states_far_from_zero(shift: float) -> None:
    """Equation 1 depends on the difference of the log-sum-exps only; a raw sum of exponentials would overflow."""
    a, b = AttentionState(torch.ones(1, 4), torch.tensor([0.5])), AttentionState(torch.zeros(1, 4), torch.tensor([1.5]))
    share = 1 / (1 + torch.e)
    moved = merge_states(AttentionState(a.out, a.lse + shift), AttentionState(b.out, b.lse + shift))
    torch.testing.assert_close(moved.out, torch.full((1, 4), share), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved.lse, torch.tensor([1.5 + shift + 0.3133]), rtol=1e-6, atol=1e-3)


def test_heads_merge_apart() -> None:
    """A head without evicted tokens (or that does not use them) keeps its state beside one that merges."""
    query, keys, values = random_qkv(5, 20)
    kept = attention_state(query, keys[:, :10], values[:, :10], 0.35)
    evicted = attention_state(query, keys[:, 10:], values[:, 10:], 0.35)
    used = torch.tensor([[True, False, True], [False, True, False]])
    merged = merge_states(kept, AttentionState(evicted.out, evicted.lse.masked_fill(~used, -torch.inf)))
    assert torch.equal(merged.out[~used], kept.out[~used])
    both = softmax64(query, keys, values, 0.35)
    torch.testing.assert_close(merged.out[used].double(), both.out[used], **TOLERANCE)


# the gate


@given(SEEDS, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_cosine_knows_directions_only(seed: int, stretch_a: float, stretch_b: float) -> None:
    a, b = torch.randn((2, 5, 16), generator=torch.Generator().manual_seed(seed))
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    torch.testing.assert_close(cosine(a * stretch_a, b * stretch_b).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cosine(a, a * stretch_a), torch.ones(5))
    torch.testing.assert_close(cosine(a, a * -stretch_a), -torch.ones(5))


def test_cosine_of_a_zero_vector_is_zero() -> None:
    assert cosine(torch.zeros(2, 4), torch.ones(2, 4)).tolist() == [0, 0]
    assert cosine(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]


THRESHOLDS = (0.5, 0.75)
# rho, of a sequence with two KV heads of two query heads; one value is a threshold itself. r: recompute, m: merge, -.
GATED = [
    ("GROUP", [[0.4, 0.9], [0.6, 0.9]], ["rr", "-m"]),
    ("GROUP", [[0.5, 0.75], [0.8, 0.9]], ["--", "mm"]),
    ("GROUP", [[0.75001, 0.49999], [-1.0, -1.0]], ["rr", "rr"]),
    ("HEAD", [[0.4, 0.9], [0.6, 0.9]], ["rm", "-m"]),
    ("HEAD", [[0.5, 0.75], [0.49999, 0.75001]], ["--", "rm"]),
    ("GROUP_MEAN", [[0.1, 0.85], [0.5, 0.5]], ["rr", "--"]),
    ("GROUP_MEAN", [[0.4, 1.0], [0.7, 0.9]], ["--", "mm"]),
    ("GROUP_MEAN", [[0.5, 1.0], [0.25, 0.75]], ["--", "--"]),
]


def letters(recompute: Tensor, merge: Tensor) -> list[str]:
    assert not (recompute & merge).any()
    return ["".join("r" if r else "m" if m else "-" for r, m in zip(*rows)) for rows in zip(recompute, merge)]


@pytest.mark.parametrize(("gate", "rho", "expected"), GATED)
def test_gate(gate: str, rho: list[list[float]], expected: list[str]) -> None:
    low, high = THRESHOLDS
    decision = decide(torch.tensor([rho]), torch.tensor([low]), torch.tensor([high]), torch.tensor([Gate[gate]]))
    assert letters(decision.recompute[0], decision.merge[0]) == expected


def test_every_row_has_its_own_gate_and_thresholds() -> None:
    """One batch with all cases above, and one with thresholds that never and always recompute."""
    low, high = (torch.full((len(GATED),), threshold) for threshold in THRESHOLDS)
    gates = torch.tensor([Gate[gate] for gate, _, _ in GATED])
    decision = decide(torch.tensor([rho for _, rho, _ in GATED]), low, high, gates)
    for row, (_, _, expected) in enumerate(GATED):
        assert letters(decision.recompute[row], decision.merge[row]) == expected

    rho = torch.tensor([[[1.0, -1.0]]]).expand(3, 1, 2)
    decision = decide(rho, torch.tensor([-2.0, 2.0, -2.0]), torch.tensor([2.0, 2.0, -2.0]), torch.zeros(3, dtype=int))
    assert [letters(*row)[0] for row in zip(decision.recompute, decision.merge)] == ["--", "rr", "mm"]


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
    st.sampled_from(list(Gate)),
)
def test_gate_against_the_algorithm_written_with_loops(
    values: list[float], theta_a: float, theta_b: float, gate: Gate
) -> None:
    low, high = sorted((theta_a, theta_b))
    rho = torch.tensor(values).view(1, 2, 3)
    decision = decide(rho, torch.tensor([low]), torch.tensor([high]), torch.tensor([gate]))
    expected = []
    for group in rho[0]:
        heads = [float(group.mean())] * 3 if gate == Gate.GROUP_MEAN else group.tolist()
        below = [value < low for value in heads]
        if gate == Gate.GROUP:
            below = [any(below)] * 3
        expected.append("".join("r" if r else "m" if value > high else "-" for r, value in zip(below, heads)))
    assert letters(decision.recompute[0], decision.merge[0]) == expected


def test_gate_names() -> None:
    assert [Gate.of(name) for name in ("group", "head", "group_mean")] == [Gate.GROUP, Gate.HEAD, Gate.GROUP_MEAN]
