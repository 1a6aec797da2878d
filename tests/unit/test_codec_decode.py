"""Decode over encoded evicted KV, and under a read budget: torch against what the codecs decode to, row by row."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_native_decode import LAYER, LAYERS, Case, assert_same
from vllm_calidrop.algorithm.calibration import Gate, cosine, decide
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.cpp import build
from vllm_calidrop.ops.reference import decode as cpu
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.worker.state_table import StateTable

ENCODED = ("int2", "none", "fp8", "int4_plain", "int8")


def decoded_case(case: Case) -> Case:
    """The same case with all evicted KV as its codecs decode it, in a pool without codecs."""
    rows, pool = case.rows, case.pool
    assert rows.codec is not None
    other = Case.__new__(Case)
    other.cache, other.table, other.queries = case.cache, case.table, case.queries
    heads, head_dim = pool.memory.shape[2], case.cache.head_dim
    width = -(-int(rows.stored.max()) // 128)
    other.pool = SwapPool(LAYERS, len(rows.stored) * width, heads, head_dim, torch.float32)
    blocks = torch.arange(len(rows.stored) * width).view(-1, width)
    for index, tokens in enumerate(rows.stored.tolist()):
        codec = int(rows.codec[index])
        theirs = rows.swap_blocks[index, : pool.codecs[codec].blocks_for(tokens)]
        keys, values = pool.read(LAYER, theirs.expand(heads, -1), torch.arange(heads), codec)
        mine = blocks[index, : -(-tokens // 128)]
        other.pool.write(LAYER, mine, keys[:, :tokens].float(), values[:, :tokens].float())
    other.rows = type(rows)(**{**vars(rows), "swap_blocks": blocks, "codec": None})
    return other


@pytest.mark.parametrize("name", CODECS)
def test_one_codec(name: str) -> None:
    case = Case("vec", 32, torch.float32, 4, 64, codecs=(name, name))
    expected, expected_table = decoded_case(case).run(cpu.decode)
    out, table = case.run(cpu.decode)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(table.lse, expected_table.lse, rtol=1e-5, atol=2e-6)
    assert torch.equal(table.counts, expected_table.counts)


@pytest.mark.parametrize("most_reads", [(), (0, 1, 2, 9)])
def test_mixed_codecs_in_one_batch(most_reads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs longer than a block of theirs, and more pairs than are read at once."""
    monkeypatch.setattr(cpu, "RECOMPUTE_TOKENS", 2000)
    case = Case(
        "vec", 32, torch.float32, 2, 64, kv_heads=3, codecs=ENCODED, most_reads=most_reads,
        stored=(1500, 16, 0, 700, 129, 2000, 1), thresholds=(0.9, 0.95),
    )  # fmt: skip
    expected, expected_table = decoded_case(case).run(cpu.decode)
    out, table = case.run(cpu.decode)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(table.lse, expected_table.lse, rtol=1e-5, atol=2e-6)
    assert torch.equal(table.counts, expected_table.counts)
    assert (table.counts[:, LAYER, COUNTERS.index("skipped")].sum() > 0) == bool(most_reads)


needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float32), (128, torch.bfloat16), (32, torch.float16)])
def test_cpp_decodes_as_torch_does(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_same(
        Case("vec16", 16, dtype, 3, head_dim, codecs=(name, name), stored=(1500, 1, 17, 0, 129, 700)), tolerance=4e-6
    )


@needs_compiler
@pytest.mark.parametrize("thresholds", [(0.9, 0.95), (2.0, 2.0), (-2.0, -2.0)])
@pytest.mark.parametrize("most_reads", [(), (0, 1, 2, 9)])
def test_cpp_with_mixed_codecs_and_budgets(thresholds: tuple[float, float], most_reads: tuple[int, ...]) -> None:
    table = assert_same(
        Case("vec", 32, torch.bfloat16, 2, 64, kv_heads=3, codecs=ENCODED, most_reads=most_reads,
             stored=(1500, 16, 0, 700, 129, 2000, 1), thresholds=thresholds), tolerance=4e-6,
    )  # fmt: skip
    skipped = table.counts[:, LAYER, COUNTERS.index("skipped")].sum()
    assert (skipped > 0) == (bool(most_reads) and thresholds[0] > -2)


@needs_compiler
def test_cpp_leaves_refused_heads_plain() -> None:
    """Their blocks hold nothing that may be read; the other heads of the sequence go on."""
    for thresholds in ((2.0, 2.0), (-2.0, -2.0), (0.7, 0.85)):
        case = Case("vec", 32, torch.float32, 4, 64, kv_heads=3, codecs=("int4", "int4"), thresholds=thresholds)
        for slot in case.rows.calibrated_slots.tolist():
            case.table.refuse(LAYER, slot, torch.tensor([False, True, False]))
        case.pool.memory[:, :, 1] = 255
        (out, table), (expected, expected_table) = case.run(native.decode), case.run(cpu.decode)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(table.query, expected_table.query, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(table.counts, expected_table.counts)
        assert table.query[LAYER, case.rows.calibrated_slots][:, 1].isnan().all()
        assert not table.query[LAYER, case.rows.calibrated_slots][:, [0, 2]].isnan().any()


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
    table.refuse(0, 1, torch.tensor([False, True, False]))
    rho = cosine(torch.randn((1, 3, 2, 16)), table.query[0, 1:])
    for theta1, theta2 in ((2.0, 2.0), (-2.0, -2.0), (0.7, 0.85)):
        for most in (None, torch.tensor([2])):
            decision = decide(rho, torch.tensor([theta1]), torch.tensor([theta2]), torch.tensor([int(gate)]), most)
            assert not decision.recompute[0, 1].any() and not decision.merge[0, 1].any()
            assert (decision.recompute | decision.merge)[0, [0, 2]].all() or theta1 == 0.7
    assert table.counts[1, 0, COUNTERS.index("nonfinite")] == 1
    assert not table.counts[0].any()
