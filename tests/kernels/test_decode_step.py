"""Decode through the kernels against `calibration.py`, row by row: lengths at tile and block edges, every branch."""

from __future__ import annotations

import random

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from benchmarks.kernels.cases import LAYER, ROWS, Row, Shape, assert_same, copy_of, make, run
from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.ops.state import refuse_heads
from vllm_calidrop.ops.triton import make_scratch, scratch, scratch_bytes, splits_for, view_scratch
from vllm_calidrop.ops.triton.scratch import evicted_splits_for
from vllm_calidrop.records import COUNTERS

SHAPES = [
    Shape(),
    Shape(kv_heads=1, group=1, head_dim=96, block_size=48, layout="cpu-vec"),
    Shape(kv_heads=3, group=5, head_dim=80, block_size=32, layout="cuda-heads"),
    Shape(group=16, head_dim=128),
    Shape(kv_heads=1, group=2, head_dim=256, block_size=16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape: Shape) -> None:
    case = make(shape, ROWS)
    assert_same(case, run(case))


@pytest.mark.parametrize("seed", range(3))
def test_random_batches(seed: int) -> None:
    pick = random.Random(seed)
    layout, block_size = pick.choice(("cuda-tokens", "cuda-heads", "cpu-vec")), 16 * pick.randint(1, 9)
    shape = Shape(pick.randint(1, 3), pick.randint(1, 16), 8 * pick.randint(2, 20), block_size, torch.float32, layout)
    rows = []
    for _ in range(5):
        end = pick.randint(1, 200)
        theta1 = pick.uniform(-1, 1)
        rows.append(
            Row(
                end, pick.randrange(end), pick.choice((0, pick.randint(1, 260))), pick.random() < 0.2, theta1,
                pick.uniform(theta1, 1), pick.randrange(len(Gate)), pick.uniform(0, 3),
            )
        )  # fmt: skip
    case = make(shape, rows, seed)
    assert_same(case, run(case, pick.randint(1, 3)))


# Around the edges of pages (16), groups (80, 112) and blocks of the codecs.
STORED = (1, 17, 79, 113, 240, 449, 900)
OTHER = Shape(kv_heads=3, group=5, head_dim=80, dtype=torch.bfloat16, layout="cuda-heads")


@pytest.mark.parametrize(
    ("codec", "shape"), [*((codec, Shape()) for codec in list(CODECS)[1:]), ("fp8", OTHER), ("int2", OTHER)], ids=str
)
def test_codecs(shape: Shape, codec: str) -> None:
    """Everybody reads; against `Codec.decode` and the attention over that."""
    rows = [Row(20, 5, stored, theta1=2.0, theta2=2.0, codec=codec) for stored in STORED]
    case = make(shape, rows)
    tolerance = 1e-2 if shape.dtype == torch.bfloat16 else 1e-4  # queries and weights count to 16 bits
    assert_same(case, run(case, splits=3), tolerance, tolerance)


def test_mixed_codecs_and_budgets() -> None:
    rows = [
        Row(40, 5, 200, theta1=theta, theta2=0.9, gate=gate, near=2.0, codec=codec, most_reads=most)
        for codec, most in zip(CODECS, (None, 0, 1, 2, 3, None, 1, 9, 0))
        for gate, theta in ((Gate.GROUP, 2.0), (Gate.HEAD, 0.7), (Gate.GROUP_MEAN, 0.7))
    ]
    case = make(Shape(kv_heads=4, group=2, head_dim=32), rows)
    counts = assert_same(case, run(case), 1e-4, 1e-4).table.counts[:, LAYER].sum(0)
    assert (counts[: COUNTERS.index("group_reads") + 1] > 0).all() and counts[COUNTERS.index("skipped")] > 0


def test_ties_of_a_budget_go_to_the_lower_head() -> None:
    case = make(Shape(kv_heads=5, group=2, head_dim=32), [Row(20, 4, 30, theta1=2.0, theta2=0.5, most_reads=3)])
    case.query[:] = case.query[0, :1]
    slot = int(case.rows.slot[0])
    case.table.query[LAYER, slot] = case.table.query[LAYER, slot, :1, :1]
    wanted = assert_same(case, run(case)).table
    renewed = (wanted.query[LAYER, slot] == case.query[0, 0]).all(-1).all(-1)
    assert renewed.tolist() == [True, True, True, False, False]


def test_every_branch_is_taken_by_every_gate() -> None:
    rows = [Row(20, start=3, stored=40, gate=gate, near=near) for near in (0.8, 1.4, 4.0) for gate in Gate]
    case = make(Shape(head_dim=32), rows, seed=1)
    counts = assert_same(case, run(case)).table.counts[:, LAYER]
    for gate in Gate:
        of_gate = counts[case.rows.slot[gate :: len(Gate)].long()].sum(0)
        assert (of_gate[:4] > 0).all(), (gate, of_gate)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_sixteen_bits(dtype: torch.dtype, tolerance: float) -> None:
    """Weights are rounded before they meet the values, and accumulated in fp32."""
    case = make(Shape(dtype=dtype), ROWS)
    assert_same(case, run(case), tolerance, tolerance)


@pytest.mark.parametrize("thresholds", [(2.0, 2.0), (-2.0, -2.0), (-2.0, 2.0)])
def test_extreme_thresholds(thresholds: tuple[float, float]) -> None:
    rows = [Row(40, 7, 150, theta1=thresholds[0], theta2=thresholds[1], gate=gate) for gate in Gate]
    case = make(Shape(), rows)
    assert_same(case, run(case))


def test_a_rho_equal_to_a_threshold_is_inside_the_band() -> None:
    case = make(Shape(kv_heads=1, group=2), [Row(20, 4, 30, theta1=1.0, theta2=1.0, gate=gate) for gate in Gate])
    case.query.zero_()[..., 0] = 2.0
    case.table.query.zero_()[..., 0] = 4.0
    counts = assert_same(case, run(case)).table.counts[:, LAYER]
    assert counts.sum(0)[:4].tolist() == [0, 0, 6, 0]


@pytest.mark.parametrize("theta1", [-2.0, 2.0])
def test_a_kv_head_with_nothing_to_read_stays_plain(theta1: float) -> None:
    """`refuse_heads`: its stored query is NaN, which is similar to none and unlike none."""
    case = make(Shape(group=2, head_dim=32), [Row(20, 4, 30, theta1=theta1, theta2=theta1, gate=gate) for gate in Gate])
    for slot in case.rows.slot.tolist():
        refuse_heads(case.table.layers[LAYER], slot, torch.tensor([False, True]))
    counts = assert_same(case, run(case)).table.counts[:, LAYER].sum(0)
    assert counts[:4].tolist() == ([6, 0, 6, 3] if theta1 > 1 else [0, 6, 6, 0])


def test_nothing_evicted_in_a_stored_state_changes_nothing() -> None:
    """A slot's state before its first recomputation may be that of an empty set: out 0, lse -inf; a zero query too."""
    rows = [Row(30, 5, 20, theta1=-2.0, theta2=-2.0), Row(30, 5, 20, theta1=0.5, theta2=0.5)]
    case = make(Shape(), rows)
    case.table.query.zero_()
    case.table.out.zero_()
    case.table.lse.fill_(-torch.inf)
    found = run(case)
    assert_same(case, found)
    case.sequences.stored.zero_()
    token = int(case.rows.token[0])
    torch.testing.assert_close(found.out[token], run(case).out[token])


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_and_the_order_of_programs_change_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order programs run in: in particular, a split sees the state table as it was before the step."""
    rows = [Row(150, 9, 300, gate=gate) for gate in Gate] + [Row(150, 9, 300, theta1=2.0, theta2=2.0)]
    case = make(Shape(kv_heads=1, group=2, head_dim=32), rows)
    forward = run(case, splits)
    assert_same(case, forward)
    set_index = interpreter_builder.set_grid_idx

    def set_from_the_end(*index: int) -> None:
        set_index(*(size - 1 - i for size, i in zip(interpreter_builder.grid_dim, index)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_from_the_end)
    backward = run(case, splits)
    assert torch.equal(backward.out, forward.out) and torch.equal(backward.lse, forward.lse)
    assert torch.equal(backward.table.lse, forward.table.lse) and torch.equal(backward.table.out, forward.table.out)
    assert torch.equal(backward.table.counts, forward.table.counts)


def test_a_step_follows_a_step() -> None:
    """The second step sees what the first one stored: the same query merges now, and the answer stays."""
    case = make(Shape(), [Row(40, 7, 150, theta1=0.9, theta2=0.9, near=5.0, gate=Gate.HEAD)])
    first = run(case)
    case.table = copy_of(first.table)
    second = run(case)
    assert_same(case, second)
    recomputes, merges = (second.table.counts - first.table.counts)[:, LAYER].sum(0)[:2].tolist()
    assert (recomputes, merges) == (0, 8)
    torch.testing.assert_close(second.out, first.out)


@pytest.mark.parametrize("programs", [8, 512])
def test_scratch_serves_every_batch_up_to_its_size(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROGRAMS", programs)
    monkeypatch.setattr(scratch, "EVICTED_SPLITS", programs // 64 or 1)
    for rows, kv_heads in ((1, 1), (7, 2), (64, 8), (300, 8)):
        flat = make_scratch(rows, kv_heads, 2, 8, "cpu")
        assert sum(tensor.numel() * tensor.itemsize for tensor in flat) == scratch_bytes(rows, kv_heads, 2, 8)
        for count in range(1, rows + 1):
            view = view_scratch(flat, count, kv_heads, 2, 8)
            assert view.kept_out.shape == (count, kv_heads * 2, splits_for(count, kv_heads), 8)
            assert view.evicted_out.shape == (count, kv_heads * 2, evicted_splits_for(count, kv_heads), 8)
