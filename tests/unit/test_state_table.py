"""The calibration state table: slots and layers stay apart, a new sequence starts from nothing, counts add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_calidrop.algorithm.calibration import AttentionState, Decision
from vllm_calidrop.ops.state import count_decision, store_state
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.worker.state_table import StateTable

LAYERS, SLOTS, KV_HEADS, GROUP, HEAD_DIM = 3, 4, 2, 3, 8


def make_table(dtype: torch.dtype = torch.float32) -> StateTable:
    return StateTable(LAYERS, SLOTS, KV_HEADS, GROUP, HEAD_DIM, dtype)


def some_state(seed: int) -> tuple[torch.Tensor, AttentionState]:
    generator = torch.Generator().manual_seed(seed)
    query, out = torch.randn((2, KV_HEADS, GROUP, HEAD_DIM), generator=generator)
    return query, AttentionState(out, torch.randn((KV_HEADS, GROUP), generator=generator))


def test_put_is_for_one_layer_of_one_slot() -> None:
    table = make_table()
    places = {(layer, slot): some_state(10 * layer + slot) for layer in range(LAYERS) for slot in (0, 2)}
    for (layer, slot), (query, state) in places.items():
        store_state(table.layers[layer], slot, query, state)
    for (layer, slot), (query, state) in places.items():
        assert torch.equal(table.query[layer, slot], query)
        assert torch.equal(table.out[layer, slot], state.out)
        assert torch.equal(table.lse[layer, slot], state.lse)
    untouched = [1, 3]
    assert (table.query[:, untouched] == 0).all() and (table.out[:, untouched] == 0).all()
    assert (table.lse[:, untouched] == -torch.inf).all()


def test_a_new_sequence_starts_from_nothing_and_disturbs_nobody() -> None:
    table = make_table()
    for layer in range(LAYERS):
        for slot in (1, 2):
            store_state(table.layers[layer], slot, *some_state(slot))
    table.counts[:] = 5
    table.admit(1)
    assert (table.query[:, 1] == 0).all() and (table.out[:, 1] == 0).all()
    assert (table.lse[:, 1] == -torch.inf).all() and (table.counts[1] == 0).all()
    assert torch.equal(table.lse[:, 2], some_state(2)[1].lse.expand(LAYERS, -1, -1))
    assert (table.counts[[0, 2, 3]] == 5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_queries_have_the_models_dtype_and_lose_nothing(dtype: torch.dtype) -> None:
    table = make_table(dtype)
    query, state = some_state(3)
    store_state(table.layers[0], 1, query.to(dtype), state)
    assert table.query.dtype == dtype and torch.equal(table.query[0, 1], query.to(dtype))
    assert table.out.dtype == table.lse.dtype == torch.float32


HEADS = KV_HEADS * GROUP
STEPS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.permutations(range(SLOTS)).flatmap(lambda slots: st.integers(1, SLOTS).map(lambda n: slots[:n])),
        st.lists(st.sampled_from("rm-"), min_size=SLOTS * HEADS, max_size=SLOTS * HEADS),
    ),
    max_size=6,
)


@given(STEPS)
def test_counts_against_counting_one_by_one(steps: list[tuple[int, list[int], list[str]]]) -> None:
    table = make_table()
    expected = [[dict.fromkeys(COUNTERS, 0) for _ in range(LAYERS)] for _ in range(SLOTS)]
    names = {"r": "recomputes", "m": "merges", "-": "plain"}
    for layer, slots, letters in steps:
        rows = [letters[HEADS * row : HEADS * (row + 1)] for row in range(len(slots))]
        grid = [[row[GROUP * head : GROUP * (head + 1)] for head in range(KV_HEADS)] for row in rows]
        recompute, merge = (torch.tensor([[[c == what for c in g] for g in row] for row in grid]) for what in "rm")
        count_decision(table.layers[layer], torch.tensor(slots), Decision(recompute, merge))
        for slot, row in zip(slots, grid):
            for group in row:
                expected[slot][layer]["group_reads"] += "r" in group
                for letter in group:
                    expected[slot][layer][names[letter]] += 1
    assert table.counts.tolist() == [[list(layer.values()) for layer in slot] for slot in expected]
