"""(c) Puts a row's answer together, and is the only writer of the state table and the counters.

A split of (a) or (b) that wrote the state would change what other splits see; here all of them are done. Meaning:
`calibration.py::merge_states`, `StateTable.put` of the heads that recomputed, `StateTable.count`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.ops.contract import Rows, Sequences, State
from vllm_calidrop.ops.triton.gate import MERGE, RECOMPUTE, are_barred, is_barred
from vllm_calidrop.ops.triton.scratch import Scratch
from vllm_calidrop.ops.triton.tiles import power_of_two
from vllm_calidrop.records import COUNTERS

SKIPPED: tl.constexpr = tl.constexpr(COUNTERS.index("skipped"))


def merge_row(
    query: Tensor, out: Tensor, rows: Rows, sequences: Sequences, state: State, scratch: Scratch,
    lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Kept splits and, by decision, evicted splits or the stored state -> out[token]; renews state, adds to counts.

    out: [tokens, Hq, D], stride(2) == 1, any float dtype; only the rows' tokens are written. lse: float32 [N, Hq],
    contiguous, the log-sum-exp of all that was attended, if given. Grid: (N, Hq).
    """
    num_rows, heads, kept_splits = scratch.kept_lse.shape
    kv_heads, group, head_dim = state.query.shape[1:]
    assert query.stride(2) == 1 and out.stride(2) == 1 and state.counts.stride(1) == 1
    assert state.query.is_contiguous() and state.out.is_contiguous() and state.lse.is_contiguous()
    assert lse is None or lse.is_contiguous()
    merge_kernel[(num_rows, heads)](
        query, out, lse, rows.slot, rows.token, rows.end, sequences.start, sequences.stored, sequences.most_reads,
        scratch.kept_out, scratch.kept_lse, scratch.evicted_out, scratch.evicted_lse, scratch.decision,
        scratch.similarity, state.query, state.out, state.lse, state.counts,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), state.counts.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, KEPT_SPLITS=kept_splits,
        EVICTED_SPLITS=scratch.evicted_lse.shape[2], TILE_H=power_of_two(kv_heads), TILE_M=power_of_two(group),
        TILE_D=power_of_two(head_dim), num_warps=1,
    )  # fmt: skip


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, out, lse, slot_of_row, token_of_row, end_of_row, start_of_slot, stored_of_slot, most_reads, kept_out,
    kept_lse, evicted_out, evicted_lse, decision, similarity, state_query, state_out, state_lse, counts,
    query_token, query_head, out_token,
    out_head, counts_slot,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KEPT_SPLITS: tl.constexpr,
    EVICTED_SPLITS: tl.constexpr, TILE_H: tl.constexpr, TILE_M: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: one query head of one row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_of_row + row).to(tl.int64)
    compacted = slot >= 0
    start = tl.load(start_of_slot + slot, mask=compacted, other=0)
    if tl.load(end_of_row + row) <= start:
        return
    heads: tl.constexpr = KV_HEADS * GROUP
    d = tl.arange(0, TILE_D)
    in_head = d < HEAD_DIM
    of_row = row * heads + head
    answer, log = combine_splits(kept_out, kept_lse, of_row, d, in_head, KEPT_SPLITS, HEAD_DIM)
    token = tl.load(token_of_row + row).to(tl.int64)
    stored = tl.load(stored_of_slot + slot, mask=compacted, other=0)
    if stored > 0:
        most = tl.load(most_reads + slot)
        choice = tl.load(decision + of_row)
        if choice >= RECOMPUTE:
            choice -= RECOMPUTE * is_barred(similarity, row, head // GROUP, most, KV_HEADS, TILE_H).to(tl.int32)
        place = slot * heads + head
        if choice >= RECOMPUTE:
            fresh, fresh_log = combine_splits(evicted_out, evicted_lse, of_row, d, in_head, EVICTED_SPLITS, HEAD_DIM)
            q = tl.load(query + token * query_token + head * query_head + d, mask=in_head, other=0.0)
            tl.store(state_query + place * HEAD_DIM + d, q, mask=in_head)
            tl.store(state_out + place * HEAD_DIM + d, fresh, mask=in_head)
            tl.store(state_lse + place, fresh_log)
            answer, log = merge_two(answer, log, fresh, fresh_log)
        elif choice == MERGE:
            old = tl.load(state_out + place * HEAD_DIM + d, mask=in_head, other=0.0)
            answer, log = merge_two(answer, log, old, tl.load(state_lse + place))
        if head == 0:
            count(decision, similarity, most, counts, row, slot, counts_slot, KV_HEADS, GROUP, TILE_H, TILE_M)
    tl.store(out + token * out_token + head * out_head + d, answer.to(out.dtype.element_ty), mask=in_head)
    if lse is not None:
        tl.store(lse + of_row, log)


@triton.jit
def merge_two(out_a, lse_a, out_b, lse_b):  # type: ignore[no-untyped-def]
    """State over the union of two disjoint token sets; an empty one (lse = -inf) changes nothing."""
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = weight_a + weight_b
    some = tl.where(total > 0.0, total, 1.0)
    log = tl.where(total > 0.0, top + tl.log(some), float("-inf"))
    return (out_a * weight_a + out_b * weight_b) / some, log


@triton.jit
def combine_splits(  # type: ignore[no-untyped-def]
    partial_out, partial_lse, head, d, in_head, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """State over all splits of a head; the out of an empty split was not written and is not read."""
    out = d * 0.0
    log = tl.full((), float("-inf"), dtype=tl.float32)
    for split in range(SPLITS):
        place = head * SPLITS + split
        part_log = tl.load(partial_lse + place)
        written = part_log + d * 0.0 > float("-inf")  # a vector: the interpreter cannot spread a scalar comparison
        part = tl.load(partial_out + place * HEAD_DIM + d, mask=in_head & written, other=0.0)
        out, log = merge_two(out, log, part, part_log)
    return out, log


@triton.jit
def count(  # type: ignore[no-untyped-def]
    decision, similarity, most, counts, row, slot, counts_slot, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    TILE_H: tl.constexpr, TILE_M: tl.constexpr
):  # fmt: skip
    """Add a row's decisions to recomputes, merges, plain, group_reads and skipped (records.COUNTERS); one program per
    row."""
    h, m = tl.arange(0, TILE_H)[:, None], tl.arange(0, TILE_M)[None, :]
    choice = tl.load(decision + row * (KV_HEADS * GROUP) + h * GROUP + m, mask=(h < KV_HEADS) & (m < GROUP), other=-1)
    barred = are_barred(similarity, row, most, KV_HEADS, TILE_H)
    choice = tl.where(choice >= RECOMPUTE, choice - RECOMPUTE * barred[:, None], choice)
    recomputed = (choice >= RECOMPUTE).to(tl.int32)
    recomputes = tl.sum(tl.sum(recomputed, axis=1), axis=0)
    merges = tl.sum(tl.sum((choice == MERGE).to(tl.int32), axis=1), axis=0)
    reads = tl.sum(tl.max(recomputed, axis=1), axis=0)
    plain = KV_HEADS * GROUP - recomputes - merges
    at = counts + slot * counts_slot
    tl.store(at, tl.load(at) + recomputes)
    tl.store(at + 1, tl.load(at + 1) + merges)
    tl.store(at + 2, tl.load(at + 2) + plain)
    tl.store(at + 3, tl.load(at + 3) + reads)
    tl.store(at + SKIPPED, tl.load(at + SKIPPED) + tl.sum(barred, axis=0))
