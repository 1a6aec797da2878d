"""Time of a layer's decode step: attention over the full prompt, over kept tokens with calibration, in xFormers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import workload
from benchmarks.kernels.cases import DecodeStep
from benchmarks.kernels.device import seconds
from benchmarks.kernels.resources import ModelShape
from benchmarks.kernels.workload import Limits, Workload
from vllm_calidrop.ops.base import ModelKV


def xformers_step(work: Workload) -> DecodeStep | None:
    """The second implementation, where it is installed and can serve this workload."""
    if importlib.util.find_spec("xformers") is None:
        return None
    from vllm_calidrop.ops import xformers

    model = ModelKV(work.query.dtype, *work.shape, workload.BLOCK_SIZE, isa=None)
    serves = xformers.XformersSet.refusal(model) is None and xformers.can_read(work.cache)
    return xformers.decode_step if serves or work.query.device.type != "cuda" else None


def times(
    shape: ModelShape, batch: int, context: int, budgets: tuple[int, ...], device: torch.device, dtype: torch.dtype,
    limits: Limits, repeats: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Microseconds, captured in a CUDA graph except where `launched` says that kernels were launched one by one.

    First attention over the whole prompt: these kernels, torch's on contiguous K and V, xFormers'. Then every budget:
    nothing recomputed (what was stored is merged), and one row in eight recomputing, at least one.
    """
    full = workload.make(shape, batch, context, 1, device, dtype, limits)
    full.sequences.stored.zero_()
    other = xformers_step(full)
    record = {"batch": batch, "context": context}
    yield record | {
        "full": _us(full.step(), device, repeats),
        "full_torch": _torch(shape, batch, context, device, dtype, limits, repeats),
        **_against(full, other, "full", repeats),
    }
    del full
    for budget in budgets:
        if budget >= context:
            continue
        work = workload.make(shape, batch, budget, context - budget, device, dtype, limits)
        few = max(1, batch // 8)
        found = record | {"budget": budget, "merge": _us(work.step(), device, repeats)}
        found |= _against(work, other, "merge", repeats)
        work.recompute(few)
        found |= {"recomputing_rows": few, "recompute": _us(work.step(), device, repeats)}
        yield found | _against(work, other, "recompute", repeats)


def _against(work: Workload, other: DecodeStep | None, name: str, repeats: int) -> dict[str, Any]:
    """These kernels and xFormers', both launched: xFormers allocates, so it is not captured."""
    device = work.query.device
    mine = seconds(work.step(), device, repeats, captured=False) * 1e6
    theirs = seconds(work.step(other), device, repeats, captured=False) * 1e6 if other else None
    return {f"{name}_launched": mine, f"{name}_xformers_launched": theirs}


def _us(call: Any, device: torch.device, repeats: int) -> float:
    return seconds(call, device, repeats) * 1e6


def _torch(
    shape: ModelShape, batch: int, context: int, device: torch.device, dtype: torch.dtype, limits: Limits, repeats: int
) -> float | None:
    """scaled_dot_product_attention; None where K and V, which must be contiguous, would not fit."""
    kv_heads, group, head_dim = shape
    size = (batch, kv_heads, context, head_dim)
    if 2 * dtype.itemsize * batch * kv_heads * context * head_dim > limits.cache:
        return None
    query = torch.empty((batch, kv_heads * group, 1, head_dim), dtype=dtype, device=device).normal_()
    key, value = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2))

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=group > 1)

    return _us(attend, device, repeats)
