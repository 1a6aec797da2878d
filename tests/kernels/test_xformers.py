"""The second implementation, through xFormers' own Triton kernels under the interpreter, against the same reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import LAYER, ROWS, Row, Shape, assert_same, make, run
from benchmarks.kernels.device import let_xformers_be_interpreted
from tests.support.workers import cuda_worker
from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.memory import ModelShape
from vllm_calidrop.ops import registry, xformers
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.ops.triton.operators import TritonSet
from vllm_calidrop.ops.xformers import XformersSet

let_xformers_be_interpreted()


def model_of(shape: Shape, dtype: torch.dtype) -> ModelKV:
    return ModelKV(dtype, shape.kv_heads, shape.group, shape.head_dim, shape.block_size, isa=None)


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
    assert XformersSet.refusal(model_of(shape, torch.float16)) is None and xformers.can_read(case.cache)
    assert_same(case, run(case, splits, xformers.decode_step))


def test_every_branch_of_every_gate() -> None:
    rows = [Row(20, start=3, stored=40, gate=gate, near=near) for near in (0.8, 1.4, 4.0) for gate in Gate]
    case = make(Shape(head_dim=32), rows, seed=1).finite()
    counts = assert_same(case, run(case, step=xformers.decode_step)).table.counts[:, LAYER]
    assert (counts.sum(0)[:4] > 0).all()


def test_it_says_what_it_cannot_do() -> None:
    """fp32, a head_dim that is no power of two and CPU layouts are refused, and so is a cache of other strides."""
    assert "float32" in str(XformersSet.refusal(model_of(Shape(), torch.float32)))
    assert "96" in str(XformersSet.refusal(model_of(Shape(head_dim=96), torch.float16)))
    assert "CUDA" in str(XformersSet.refusal(model_of(Shape(), torch.bfloat16)._replace(isa="vec")))
    assert not xformers.can_read(make(Shape(layout="cpu-vec"), [Row(1)]).cache)
    shape = ModelShape(1, 4, 2, 64, torch.float16, 256)
    operators = cuda_worker(shape, operators=XformersSet).operators
    cache = torch.zeros((3, 2, 16, 128), dtype=torch.float16)
    operators.cache_of(cache)
    operators.cache_of(torch.zeros((3, 16, 2, 128), dtype=torch.float16).transpose(1, 2))
    with pytest.raises(ValueError, match="strides"):
        operators.cache_of(torch.zeros((3, 2, 128, 16), dtype=torch.float16).transpose(2, 3))


def test_the_setting_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "uses_cuda_flavour", lambda: True)
    monkeypatch.delenv(registry.CHOICE_VARIABLE, raising=False)
    assert registry.wanted_set() is TritonSet
    monkeypatch.setenv(registry.CHOICE_VARIABLE, "xformers")
    assert registry.wanted_set() is XformersSet
    assert registry.set_for(model_of(Shape(), torch.float16)) is XformersSet
    with pytest.raises(ValueError, match=r"float32.*VLLM_CALIDROP_OPS=xformers"):
        registry.set_for(model_of(Shape(), torch.float32))
    monkeypatch.setenv(registry.CHOICE_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="auto, reference, cpp, triton, xformers"):
        registry.wanted_set()
