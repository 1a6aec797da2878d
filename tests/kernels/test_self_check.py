"""The check at start-up: it passes where kernels are right, and names the kernel that is not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.ops.gpu import CHOICE_VARIABLE
from vllm_calidrop.worker import self_check as checked
from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
from vllm_calidrop.worker.self_check import SelfCheckError, self_check

SCALE = 64**-0.5


def worker_of(
    dtype: torch.dtype = torch.bfloat16, kv_heads: int = 2, group: int = 2, swap_blocks: int = 8
) -> CaliDropCudaWorker:
    shape = ModelShape(1, kv_heads * group, kv_heads, 64, dtype, 256)
    return CaliDropCudaWorker(
        SimpleNamespace(), ["a"], shape, 1, PoolSizes(swap_blocks, 0, 0), torch.device("cpu"), max_rows=1
    )


def cache_of(worker: CaliDropCudaWorker, block_size: int = 16, heads_outside: bool = False) -> Tensor:
    kv_heads, dtype = worker.table.query.shape[2], worker.table.query.dtype
    if heads_outside:
        return torch.zeros((3, kv_heads, block_size, 128), dtype=dtype)
    return torch.zeros((3, block_size, kv_heads, 128), dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "block_size", "heads_outside", "swap_blocks"),
    [
        (torch.bfloat16, 2, 4, 16, False, 8),
        (torch.float16, 1, 1, 32, True, 1),
        (torch.float32, 3, 2, 48, False, 2),
        (torch.bfloat16, 1, 2, 16, False, 0),
    ],
)
def test_right_kernels_pass(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    block_size: int,
    heads_outside: bool,
    swap_blocks: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With pools of fewer blocks than the prompt's evicted tokens take, or none, as far as they go."""
    worker = worker_of(dtype, kv_heads, group, swap_blocks)
    with caplog.at_level("INFO", "vllm.calidrop"):
        self_check(worker, cache_of(worker, block_size, heads_outside), SCALE)
    kernels = 9 if swap_blocks else 5  # without a pool nothing is copied or reloaded
    assert f"{kernels} kernels checked on the host, interpreted" in caplog.text


def disturbed(monkeypatch: pytest.MonkeyPatch, name: str, disturb: Callable[..., None]) -> None:
    """The kernel, and then a mistake in what it wrote."""
    right = getattr(checked.triton, name)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        disturb(*arguments)

    monkeypatch.setattr(checked.triton, name, wrong)


MISTAKES: dict[str, tuple[str, Callable[..., None]]] = {
    "score": ("add_column_sums", lambda sums, *_: sums[-1, -1:].add_(0.01)),
    "copy evicted": ("copy_evicted", lambda cache, blocks, positions, pages, ids: pages[0, 0, 0, 1, 3, 5:6].add_(1)),
    "calibrate": ("calibrate", lambda *arguments: arguments[4].lse[1, 0, :1].add_(0.1)),
    "move kept": ("scatter_kept", lambda cache, blocks, *_: cache.value[int(blocks[-1]), 0, 0, :1].add_(1)),
    "decode": ("decode_kept", lambda *arguments: arguments[5].kept_lse[1, 0].add_(0.1)),
    "reload": ("reload_evicted", lambda *arguments: arguments[4].evicted_out[0, -1].mul_(1.1)),
    "reload encoded": ("reload_encoded", lambda *arguments: arguments[4].evicted_out[0, -1].mul_(1.1)),
    "merge": ("merge_row", lambda query, out, *_: out[1, 0, :1].add_(0.2)),
}


@pytest.mark.parametrize("kernel", MISTAKES)
def test_a_wrong_kernel_is_named(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of()
    disturbed(monkeypatch, *MISTAKES[kernel])
    with pytest.raises(SelfCheckError, match=rf"the kernel '{kernel}' differs by .* nothing is served.*torch 2"):
        self_check(worker, cache_of(worker), SCALE)


@pytest.mark.parametrize(
    ("name", "disturb"),
    [
        ("merge_row", lambda query, out, *_: out[2, 0, :1].add_(1)),  # a padding row is written
        ("merge_row", lambda *arguments: arguments[4].counts[0, :1].add_(1)),
        ("merge_row", lambda *arguments: arguments[4].query[1, 0, 0, :1].add_(1)),
        ("merge_row", lambda query, out, *_: out[0, 0, :1].fill_(torch.nan)),
    ],
)
def test_whatever_else_merge_must_leave_or_count(
    name: str, disturb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()
    disturbed(monkeypatch, name, disturb)
    with pytest.raises(SelfCheckError, match="the kernel 'merge' differs"):
        self_check(worker, cache_of(worker), SCALE)


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("no kernel image is available")

    worker = worker_of()
    monkeypatch.setattr(checked.triton, "reload_evicted", failing)
    with pytest.raises(SelfCheckError, match=r"'reload' cannot be run .RuntimeError: no kernel image is available"):
        self_check(worker, cache_of(worker), SCALE)


def test_xformers_is_checked_as_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators need a GPU; what is checked is that it is asked, and that a step which does nothing is refused."""
    monkeypatch.setenv(CHOICE_VARIABLE, "xformers")
    monkeypatch.setattr(checked.gpu, "decode_step_op", lambda: lambda *arguments: None)
    worker = worker_of()
    with pytest.raises(SelfCheckError, match=r"the kernel 'decode step \(xformers\)' differs"):
        self_check(worker, cache_of(worker), SCALE)
