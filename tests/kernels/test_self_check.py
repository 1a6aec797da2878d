"""The check at start-up: it passes where operators are right, and names the operator that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.device import let_xformers_be_interpreted
from tests.support.interpreter import patch_language_once
from tests.support.workers import cuda_worker
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.memory import ModelShape
from vllm_calidrop.ops.base import OperatorSet
from vllm_calidrop.ops.triton import operators
from vllm_calidrop.ops.triton.operators import TritonSet
from vllm_calidrop.ops.xformers import XformersSet
from vllm_calidrop.worker import self_check as checked
from vllm_calidrop.worker.self_check import SelfCheckError, self_check
from vllm_calidrop.worker.worker import CaliDropWorker

patch_language_once()

SCALE = 64**-0.5


def worker_of(
    dtype: torch.dtype = torch.bfloat16,
    kv_heads: int = 2,
    group: int = 2,
    swap_blocks: int = 8,
    block_size: int = 16,
    kind: type[OperatorSet] = TritonSet,
) -> CaliDropWorker:
    shape = ModelShape(1, kv_heads * group, kv_heads, 64, dtype, 256)
    return cuda_worker(shape, num_slots=1, swap_blocks=swap_blocks, max_rows=1, block_size=block_size, operators=kind)


def cache_of(worker: CaliDropWorker, heads_outside: bool = False) -> Tensor:
    model = worker.operators.model
    if heads_outside:
        return torch.zeros((3, model.num_kv_heads, model.block_size, 128), dtype=model.dtype)
    return torch.zeros((3, model.block_size, model.num_kv_heads, 128), dtype=model.dtype).transpose(1, 2)


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With pools of fewer blocks than the prompt's evicted tokens take, or none, as far as they go."""
    worker = worker_of(dtype, kv_heads, group, swap_blocks, block_size)
    compared: set[str] = set()
    compare = checked._Check._compare

    def recorded(check: checked._Check, operator: str, *values: Any) -> None:
        compared.add(operator)
        compare(check, operator, *values)

    monkeypatch.setattr(checked._Check, "_compare", recorded)
    with caplog.at_level("INFO", "vllm.calidrop"):
        self_check(worker, cache_of(worker, heads_outside), SCALE)
    assert "the triton operators checked on the host, interpreted" in caplog.text
    codecs = CODECS if swap_blocks else ["none"]
    of_codecs = {f"{operator}, codec {name}" for operator in ("pack", "decode") for name in codecs}
    if not swap_blocks:  # without a pool nothing is packed, and a decode step has the kept tokens alone
        of_codecs.remove("pack, codec none")
    assert compared == {"observe", "take", "put", "calibrate"} | of_codecs


def disturbed(monkeypatch: pytest.MonkeyPatch, kernel: str, disturb: Callable[..., None]) -> None:
    """The kernel, and then a mistake in what it wrote."""
    right = getattr(operators, kernel)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        disturb(*arguments)

    monkeypatch.setattr(operators, kernel, wrong)


def of_encoded(query: Tensor, pages: Tensor, rows: Any, sequences: Any, scratch: Any, scale: float) -> None:
    """A mistake of the kernel that decodes, which has nothing to do without a codec."""
    if sequences.codec.any():
        scratch.evicted_out[0, -1].mul_(1.1)


# The operator that the check names: the kernel, and what it does wrong.
MISTAKES: list[tuple[str, str, Callable[..., None]]] = [
    ("observe", "add_column_sums", lambda sums, *_: sums[-1, -1:].add_(0.01)),
    ("take", "gather_kept", lambda cache, blocks, positions, scratch: scratch[1, -1, -1, :1].add_(1)),
    ("put", "scatter_kept", lambda cache, blocks, *_: cache.value[int(blocks[-1]), 0, 0, :1].add_(1)),
    ("put", "scatter_kept", lambda cache, blocks, *_: cache.key[int(blocks[0]), -1, 3, 5:6].add_(1)),  # elsewhere
    ("calibrate", "calibrate", lambda *arguments: arguments[4].lse[1, 0, :1].add_(0.1)),
    ("calibrate", "calibrate", lambda *arguments: arguments[4].out[1, -1, -1, :1].add_(0.02)),
    ("calibrate", "calibrate", lambda *arguments: arguments[4].query[0, 0, 0, :1].add_(1)),  # another slot
    (
        "pack, codec none",
        "copy_evicted",
        lambda cache, blocks, positions, pages, ids: pages[0, 0, 0, 1, 3, 5:6].add_(1),
    ),
    ("decode, codec none", "decode_kept", lambda *arguments: arguments[5].kept_lse[1, 0].add_(0.1)),
    ("decode, codec none", "reload_evicted", lambda *arguments: arguments[4].evicted_out[0, -1].mul_(1.1)),
    ("decode, codec fp8", "reload_encoded", of_encoded),
    ("decode, codec none", "merge_row", lambda query, out, *_: out[1, 0, :1].add_(0.2)),
    ("decode, codec none", "merge_row", lambda query, out, *_: out[2, 0, :1].add_(0.05)),  # a padding row is written
    ("decode, codec none", "merge_row", lambda *arguments: arguments[4].counts[0, :1].add_(1)),
    ("decode, codec none", "merge_row", lambda *arguments: arguments[4].query[1, 0, 0, :1].add_(1)),
    ("decode, codec none", "merge_row", lambda query, out, *_: out[0, 0, :1].fill_(torch.nan)),
]


@pytest.mark.parametrize(
    ("operator", "kernel", "mistake"), MISTAKES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_operator_is_named(
    operator: str, kernel: str, mistake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()
    disturbed(monkeypatch, kernel, mistake)
    named = rf"the triton operator '{operator}' differs by .* nothing is served.*torch 2"
    with pytest.raises(SelfCheckError, match=named):
        self_check(worker, cache_of(worker), SCALE)


@pytest.mark.parametrize("name", CODECS)
def test_wrong_codes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes of a packed block are others."""
    worker = worker_of()
    pack = TritonSet.pack

    def wrong(*arguments: Any) -> Tensor:
        refused = pack(*arguments)
        codec, out = arguments[4:6]
        if codec.name == name:
            out[0, 0, : codec.block_bytes // 2] ^= 0x55
        return refused

    monkeypatch.setattr(TritonSet, "pack", wrong)
    with pytest.raises(SelfCheckError, match=rf"the triton operator 'pack, codec {name}' differs"):
        self_check(worker, cache_of(worker), SCALE)


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("no kernel image is available")

    worker = worker_of()
    monkeypatch.setattr(operators, "reload_evicted", failing)
    reason = r"'decode, codec none' cannot be run .RuntimeError: no kernel image is available"
    with pytest.raises(SelfCheckError, match=reason):
        self_check(worker, cache_of(worker), SCALE)


def test_xformers_is_checked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Through its own kernels, for the codec that it serves; a step of it that does nothing is refused."""
    let_xformers_be_interpreted()
    worker = worker_of(torch.float16, kind=XformersSet)
    with caplog.at_level("INFO", "vllm.calidrop"):
        self_check(worker, cache_of(worker), SCALE)
    assert "the xformers operators checked" in caplog.text
    monkeypatch.setattr("vllm_calidrop.ops.xformers.decode_step", lambda *arguments: None)
    with pytest.raises(SelfCheckError, match=r"the xformers operator 'decode, codec none' differs"):
        self_check(worker, cache_of(worker), SCALE)
