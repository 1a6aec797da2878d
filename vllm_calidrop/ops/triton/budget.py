"""Which KV heads the read budget keeps from reading their evicted KV: everyone who needs to know works it out.

A row's KV heads are ranked by (a)'s similarities, which lie together, so a pass of its own would cost more than the few
comparisons. Meaning: `calibration.py::decide` with `most_reads`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_barred(similarity, row, kv_head, most, KV_HEADS: tl.constexpr, TILE_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether `most` other KV heads of the row, or more, come before this one."""
    h = tl.arange(0, TILE_H)
    of_row = similarity + row * KV_HEADS
    theirs = tl.load(of_row + h, mask=h < KV_HEADS, other=float("inf"))
    mine = tl.load(of_row + kv_head)
    before = (theirs < mine) | ((theirs == mine) & (h < kv_head))
    return tl.sum(before.to(tl.int32), axis=0) >= most


@triton.jit
def are_barred(similarity, row, most, KV_HEADS: tl.constexpr, TILE_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of all KV heads of a row that want to read: int32 [TILE_H]."""
    h = tl.arange(0, TILE_H)
    all_of_row = tl.load(similarity + row * KV_HEADS + h, mask=h < KV_HEADS, other=float("inf"))
    mine, theirs = all_of_row[:, None], all_of_row[None, :]
    before = (theirs < mine) | ((theirs == mine) & (h[None, :] < h[:, None]))
    barred = tl.sum(before.to(tl.int32), axis=1) >= most
    return (barred & (all_of_row < float("inf"))).to(tl.int32)
