"""The second implementation, through xFormers' own Triton kernels under the interpreter, against the same reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import LAYER, ROWS, Row, Shape, assert_same, make, run
from benchmarks.kernels.device import let_xformers_be_interpreted
from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.ops import gpu, xformers
from vllm_calidrop.ops import triton as kernels

let_xformers_be_interpreted()


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
    case = make(shape, ROWS).finite()
    assert xformers.refusal(torch.float16, shape.head_dim, case.cache) is None
    assert_same(case, run(case, splits, xformers.decode_step))


def test_every_branch_of_every_gate() -> None:
    rows = [Row(20, start=3, stored=40, gate=gate, near=near) for near in (0.8, 1.4, 4.0) for gate in Gate]
    case = make(Shape(head_dim=32), rows, seed=1).finite()
    counts = assert_same(case, run(case, step=xformers.decode_step)).table.counts[:, LAYER]
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
