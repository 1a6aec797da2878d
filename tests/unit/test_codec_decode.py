"""Decode over encoded evicted KV, and under a read budget: torch against what the codecs decode to, row by row."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.unit.test_cpp_decode import LAYER, LAYERS, Case, assert_same
from vllm_calidrop.algorithm.calibration import Gate, cosine, decide
from vllm_calidrop.evicted.codecs import CODECS, number_of
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.cpp import CppSet, build
from vllm_calidrop.ops.reference import ReferenceSet
from vllm_calidrop.ops.state import refuse_heads
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.worker.slots import SlotTables
from vllm_calidrop.worker.state_table import StateTable

CPU = torch.device("cpu")
ENCODED = ("int2", "none", "fp8", "int4_plain", "int8")


def decoded_case(case: Case) -> Case:
    """The same case with all evicted KV as its codecs decode it, in a pool without codecs."""
    model, pool = case.model, case.layers.pool
    width = -(-max(case.stored) // 128)
    other = copy.copy(case)
    other.layers = case.layers.copy()
    other.layers.pool = SwapPool(LAYERS, len(case.records) * width, model.num_kv_heads, model.head_dim, torch.float32)
    other.layers.slots = SlotTables(case.layers.table.counts.shape[0], 4096, model.head_dim, model.dtype, CPU)
    for row, record in enumerate(case.records):
        mine = tuple(range(row * width, row * width + -(-record.stored // 128)))
        other.layers.slots.admit([dataclasses.replace(record, codec="none", swap_blocks=mine)])
        if record.stored:
            heads = torch.arange(model.num_kv_heads)
            theirs = torch.tensor(record.swap_blocks).expand(len(heads), -1)
            keys, values = pool.read(LAYER, theirs, heads, number_of(record.codec))
            other.layers.pool.write(LAYER, mine, keys[:, : record.stored].float(), values[:, : record.stored].float())
    return other


def assert_decodes_first(case: Case) -> StateTable:
    """The reference over codes, against the reference over what they decode to."""
    expected, expected_layers = decoded_case(case).run(ReferenceSet)
    out, layers = case.run(ReferenceSet)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(layers.table.lse, expected_layers.table.lse, rtol=1e-5, atol=2e-6)
    assert torch.equal(layers.table.counts, expected_layers.table.counts)
    return layers.table


@pytest.mark.parametrize("name", CODECS)
def test_one_codec(name: str) -> None:
    assert_decodes_first(Case("vec", 32, torch.float32, 4, 64, codecs=(name, name)))


@pytest.mark.parametrize("most_reads", [(), (0, 1, 2, 9)])
def test_mixed_codecs_in_one_batch(most_reads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs longer than a block of theirs, and more pairs than are read at once."""
    monkeypatch.setattr("vllm_calidrop.ops.reference.decode.RECOMPUTE_TOKENS", 2000)
    case = Case(
        "vec", 32, torch.float32, 2, 64, kv_heads=3, codecs=ENCODED, most_reads=most_reads,
        stored=(1500, 16, 0, 700, 129, 2000, 1), thresholds=(0.9, 0.95),
    )  # fmt: skip
    table = assert_decodes_first(case)
    assert (table.counts[:, LAYER, COUNTERS.index("skipped")].sum() > 0) == bool(most_reads)


needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float32), (128, torch.bfloat16), (32, torch.float16)])
def test_cpp_decodes_as_the_reference_does(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_same(
        Case("vec16", 16, dtype, 3, head_dim, codecs=(name, name), stored=(1500, 1, 17, 0, 129, 700)), tolerance=4e-6
    )


@needs_compiler
@pytest.mark.parametrize("thresholds", [(0.9, 0.95), (2.0, 2.0), (-2.0, -2.0)])
@pytest.mark.parametrize("most_reads", [(), (0, 1, 2, 9)])
def test_cpp_with_mixed_codecs_and_budgets(thresholds: tuple[float, float], most_reads: tuple[int, ...]) -> None:
    layers = assert_same(
        Case("vec", 32, torch.bfloat16, 2, 64, kv_heads=3, codecs=ENCODED, most_reads=most_reads,
             stored=(1500, 16, 0, 700, 129, 2000, 1), thresholds=thresholds), tolerance=4e-6,
    )  # fmt: skip
    skipped = layers.table.counts[:, LAYER, COUNTERS.index("skipped")].sum()
    assert (skipped > 0) == (bool(most_reads) and thresholds[0] > -2)


@needs_compiler
def test_cpp_leaves_refused_heads_plain() -> None:
    """Their blocks hold nothing that may be read; the other heads of the sequence go on."""
    for thresholds in ((2.0, 2.0), (-2.0, -2.0), (0.7, 0.85)):
        case = Case("vec", 32, torch.float32, 4, 64, kv_heads=3, codecs=("int4", "int4"), thresholds=thresholds)
        slots = [record.slot for record in case.records if record.stored]
        for slot in slots:
            refuse_heads(case.layers.table.layers[LAYER], slot, torch.tensor([False, True, False]))
        case.layers.pool.memory[:, :, 1] = 255
        (out, layers), (expected, expected_layers) = case.run(CppSet), case.run(ReferenceSet)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
        table, expected_table = layers.table, expected_layers.table
        torch.testing.assert_close(table.query, expected_table.query, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(table.counts, expected_table.counts)
        assert table.query[LAYER, slots][:, 1].isnan().all()
        assert not table.query[LAYER, slots][:, [0, 2]].isnan().any()


def test_read_budget_takes_the_least_similar_groups() -> None:
    """Ties go to the lower KV head; beyond the budget a head merges by its own rho or is plain."""
    rho = torch.tensor([[[0.1, 0.9], [0.5, 0.6], [0.1, 0.2], [0.95, 0.9]]]).expand(4, -1, -1)
    theta1, theta2, gate = torch.full((4,), 0.7), torch.full((4,), 0.85), torch.full((4,), int(Gate.GROUP))
    decision = decide(rho, theta1, theta2, gate, torch.tensor([0, 1, 2, 3]))
    assert decision.skipped is not None
    assert decision.recompute.all(-1).tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [True, False, True, False],
        [True, True, True, False],
    ]
    assert decision.skipped.tolist()[0] == [True, True, True, False]
    assert decision.merge[0].tolist() == [[False, True], [False, False], [False, False], [True, True]]
    unlimited = decide(rho, theta1, theta2, gate)
    assert unlimited.skipped is None and torch.equal(unlimited.recompute[3], decision.recompute[3])


@pytest.mark.parametrize("gate", list(Gate))
def test_read_budget_under_every_gate(gate: Gate) -> None:
    torch.manual_seed(0)
    rho = torch.rand((200, 5, 3)) * 2 - 1
    most = torch.arange(200) % 7
    theta1, theta2 = torch.full((200,), 0.2), torch.full((200,), 0.4)
    gates = torch.full((200,), int(gate))
    free, bounded = decide(rho, theta1, theta2, gates), decide(rho, theta1, theta2, gates, most)
    wants = free.recompute.any(-1)
    assert torch.equal(bounded.recompute.any(-1).sum(-1), torch.minimum(wants.sum(-1), most))
    similarity = rho.mean(-1) if gate is Gate.GROUP_MEAN else rho.amin(-1)
    assert bounded.skipped is not None
    chosen = bounded.recompute.any(-1)
    highest = torch.where(chosen, similarity, -torch.inf).amax(-1)
    lowest = torch.where(bounded.skipped, similarity, torch.inf).amin(-1)
    assert (highest <= lowest).all()
    assert torch.equal(chosen | bounded.skipped, wants)
    assert torch.equal(bounded.recompute, free.recompute & chosen.unsqueeze(-1))
    assert not (bounded.merge & bounded.recompute).any() and (bounded.merge | ~free.merge).all()


@pytest.mark.parametrize("gate", list(Gate))
def test_refused_heads_are_plain_for_ever(gate: Gate) -> None:
    table = StateTable(1, 2, 3, 2, 16, torch.bfloat16)
    table.query[0, 1] = torch.randn((3, 2, 16))
    refuse_heads(table.layers[0], 1, torch.tensor([False, True, False]))
    rho = cosine(torch.randn((1, 3, 2, 16)), table.query[0, 1:])
    for theta1, theta2 in ((2.0, 2.0), (-2.0, -2.0), (0.7, 0.85)):
        for most in (None, torch.tensor([2])):
            decision = decide(rho, torch.tensor([theta1]), torch.tensor([theta2]), torch.tensor([int(gate)]), most)
            assert not decision.recompute[0, 1].any() and not decision.merge[0, 1].any()
            assert (decision.recompute | decision.merge)[0, [0, 2]].all() or theta1 == 0.7
    assert table.counts[1, 0, COUNTERS.index("nonfinite")] == 1
    assert not table.counts[0].any()
