"""The gate of a KV head group, and which KV heads the read budget keeps from reading their evicted KV.

A row's KV heads are ranked by the similarities that (a) has stored, which lie together, so a pass of its own would cost
more than the few comparisons: everyone who needs to know works it out. Meaning: `algorithm/calibration.py::decide`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.ops import numbers

PLAIN: tl.constexpr = tl.constexpr(numbers.PLAIN)
MERGE: tl.constexpr = tl.constexpr(numbers.MERGE)
RECOMPUTE: tl.constexpr = tl.constexpr(numbers.RECOMPUTE)
GATE_GROUP: tl.constexpr = tl.constexpr(int(Gate.GROUP))
GATE_GROUP_MEAN: tl.constexpr = tl.constexpr(int(Gate.GROUP_MEAN))


@triton.jit
def decide(query, old, theta1, theta2, gate, in_group, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """`calibration.py::decide` for one group, without the read budget: int32 [M], and the group's similarity, inf where
    no head wants to recompute. query, old: float32 [M, D], zero beyond group and head_dim."""
    norms = tl.sqrt(tl.sum(query * query, axis=1)) * tl.sqrt(tl.sum(old * old, axis=1))
    rho = tl.sum(query * old, axis=1) / tl.maximum(norms, 1.1754943508222875e-38)
    lowest = tl.min(tl.where(in_group, rho, float("inf")), axis=0)
    mean = tl.sum(tl.where(in_group, rho, 0.0), axis=0) / GROUP
    by_mean = gate == GATE_GROUP_MEAN
    for_merge = tl.where(by_mean, mean, rho)
    for_recompute = tl.where(gate == GATE_GROUP, lowest, for_merge)
    choice = tl.where(for_merge > theta2, MERGE, PLAIN)
    wants = for_recompute < theta1
    choice = tl.where(wants, RECOMPUTE + choice, choice).to(tl.int32)
    some = tl.max((wants & in_group).to(tl.int32), axis=0) > 0
    return choice, tl.where(some, tl.where(by_mean, mean, lowest), float("inf"))


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
    """Which KV heads of a row want to read and are kept from it: int32 [TILE_H], 0 or 1."""
    h = tl.arange(0, TILE_H)
    all_of_row = tl.load(similarity + row * KV_HEADS + h, mask=h < KV_HEADS, other=float("inf"))
    mine, theirs = all_of_row[:, None], all_of_row[None, :]
    before = (theirs < mine) | ((theirs == mine) & (h[None, :] < h[:, None]))
    barred = tl.sum(before.to(tl.int32), axis=1) >= most
    return (barred & (all_of_row < float("inf"))).to(tl.int32)
