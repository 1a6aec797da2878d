"""The second implementation, through xFormers' own Triton kernels under the interpreter, against the same reference."""

from __future__ import annotations

import pytest
import torch
from xformers.ops.fmha import triton_splitk

from tests.kernels.cases import LAYER, Case, Result, Row, Shape, assert_same, copy_of, dirty_scratch, make
from tests.kernels.test_decode_step import ROWS
from vllm_calidrop.attention.ops import gpu, xformers
from vllm_calidrop.attention.ops import triton as kernels
from vllm_calidrop.calibration import Gate


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """xFormers asks for a GPU and 16 bits; its kernels under the interpreter need neither."""
    triton_splitk.FwOp.get_operator.cache_clear()
    monkeypatch.setattr(triton_splitk.FwOp, "SUPPORTED_DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(triton_splitk.FwOp, "SUPPORTED_DTYPES", {torch.float32, torch.float16})


def run(case: Case, splits: int = 2) -> Result:
    heads = case.shape.kv_heads * case.shape.group
    table = copy_of(case.table)
    out = torch.full_like(case.query, torch.inf, dtype=torch.float32)
    lse = torch.full((len(case.rows.slot), heads), torch.inf)
    xformers.decode_step(
        case.query, out, case.cache, case.pool.pages[LAYER], case.rows, case.sequences, case.state(table),
        dirty_scratch(len(case.rows.slot), heads, case.shape.head_dim, splits), case.scale, lse,
    )  # fmt: skip
    return Result(out, lse, table)


def finite(case: Case) -> Case:
    """It reads whole pages before it masks, so what lies before a row's start must be finite, as it is in a cache."""
    for view in case.cache:
        view.nan_to_num_(nan=3.0)
    case.pool.pages.nan_to_num_(nan=3.0)
    return case


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        (Shape(), 2),
        (Shape(layout="cuda-heads", block_size=32, group=3), 3),
        (Shape(kv_heads=1, group=1, block_size=48, head_dim=32), 1),
    ],
    ids=str,
)
def test_equals_reference(shape: Shape, splits: int) -> None:
    case = finite(make(shape, ROWS))
    assert xformers.refusal(torch.float16, shape.head_dim, case.cache) is None
    assert_same(case, run(case, splits))


def test_every_branch_of_every_gate() -> None:
    rows = [Row(20, start=3, stored=40, gate=gate, near=near) for near in (0.8, 1.4, 4.0) for gate in Gate]
    case = finite(make(Shape(head_dim=32), rows, seed=1))
    counts = assert_same(case, run(case)).table.counts[:, LAYER]
    assert (counts.sum(0)[:4] > 0).all()


def test_it_says_what_it_cannot_do() -> None:
    cache = make(Shape(layout="cpu-vec"), [Row(1)]).cache
    assert "float32" in str(xformers.refusal(torch.float32, 64, cache))
    assert "96" in str(xformers.refusal(torch.float16, 96, cache))
    assert "strides" in str(xformers.refusal(torch.float16, 64, cache))


def test_the_setting_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu.CHOICE_VARIABLE, raising=False)
    assert gpu.decode_step_op() is kernels.decode_step
    monkeypatch.setenv(gpu.CHOICE_VARIABLE, "xformers")
    assert gpu.decode_step_op() is xformers.decode_step
    monkeypatch.setenv(gpu.CHOICE_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="auto, triton, xformers"):
        gpu.decode_step_op()
