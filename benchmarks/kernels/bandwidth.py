"""GB/s of the kernels that move KV, against what the machine does when it only copies."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels import workload
from benchmarks.kernels.device import seconds
from benchmarks.kernels.resources import ModelShape
from benchmarks.kernels.workload import Limits
from vllm_calidrop.evicted.codecs import codec_of, number_of
from vllm_calidrop.ops import triton as ops

DECODE_GOAL, RELOAD_GOAL = 0.85, 0.9


def decode_bandwidth(
    shape: ModelShape, batch: int, kept: int, device: torch.device, dtype: torch.dtype, limits: Limits, repeats: int
) -> dict[str, Any]:
    """(a) alone; bytes are the K and V it reads. A device copy of as many bytes moves each twice."""
    work = workload.make(shape, batch, kept, 1, device, dtype, limits)
    source = torch.empty(work.kept_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), device, repeats)
    time = seconds(
        lambda: ops.decode_kept(
            work.query, work.cache, work.rows, work.sequences, work.state, work.scratch, work.scale
        ),
        device,
        repeats,
    )
    return _row("decode", batch, kept, work.kept_bytes, time, copy, DECODE_GOAL)


def reload_bandwidth(
    shape: ModelShape, batch: int, evicted: int, device: torch.device, dtype: torch.dtype, limits: Limits, repeats: int,
    codec: str = "none",
) -> dict[str, Any]:  # fmt: skip
    """(b) or (b') alone, every row recomputing; bytes are the evicted K and V as stored, from pinned memory in both
    cases. With a codec the pool's numbers are read as codes: what they mean does not matter here."""
    work = workload.make(shape, batch, 1, evicted, device, dtype, limits)
    work.recompute(batch)
    work.sequences.codec.fill_(number_of(codec))
    size = batch * shape.kv_heads * codec_of(codec, shape.head_dim, dtype).run_bytes(evicted)
    reload = ops.reload_evicted if codec == "none" else ops.reload_encoded
    ops.decode_kept(work.query, work.cache, work.rows, work.sequences, work.state, work.scratch, work.scale)
    target = torch.empty_like(work.host_pages, device=device)
    copy_time = seconds(lambda: target.copy_(work.host_pages, non_blocking=True), device, repeats)
    copy = work.host_pages.numel() * work.host_pages.itemsize / copy_time
    time = seconds(
        lambda: reload(work.query, work.pages, work.rows, work.sequences, work.scratch, work.scale), device, repeats
    )
    return _row("reload" if codec == "none" else f"reload {codec}", batch, evicted, size, time, copy, RELOAD_GOAL)


def _row(kernel: str, batch: int, tokens: int, size: int, time: float, copy: float, goal: float) -> dict[str, Any]:
    return {
        "kernel": kernel, "batch": batch, "tokens": tokens, "bytes": size, "microseconds": time * 1e6,
        "gb_per_s": size / time / 1e9, "copy_gb_per_s": copy / 1e9, "ratio": size / time / copy, "goal": goal,
    }  # fmt: skip
