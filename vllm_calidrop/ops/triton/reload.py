"""(b) Attention over the evicted tokens where the decision buffer asks for it, straight from the swap pool's pages.

The pool is pinned host memory that the kernel reads itself, so nothing is copied, nobody waits, and the grid is the
same whatever was decided. Meaning: `calibration.py::attention_state` over `SwapPool.read`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.evicted import layout
from vllm_calidrop.ops.contract import Rows, Sequences
from vllm_calidrop.ops.triton.attend import LOG2_E, attend_tile, store_partial
from vllm_calidrop.ops.triton.gate import RECOMPUTE, is_barred
from vllm_calidrop.ops.triton.scratch import Scratch
from vllm_calidrop.ops.triton.tiles import power_of_two, reload_tiles_for

PAGE_TOKENS: tl.constexpr = tl.constexpr(layout.PAGE_TOKENS)
SWAP_BLOCK_TOKENS: tl.constexpr = tl.constexpr(layout.SWAP_BLOCK_TOKENS)


def reload_evicted(
    query: Tensor, pages: Tensor, rows: Rows, sequences: Sequences, scratch: Scratch, scale: float
) -> None:
    """States over parts of the evicted tokens into scratch.evicted_*, of groups that read them and have no codec.

    query: as for `decode_kept`. pages: one layer of the swap pool, [blocks, H, PAGES_PER_BLOCK, 2, PAGE_TOKENS, D], on
    the device or pinned host memory seen as a device tensor. Evicted KV is read once for all heads of a group.
    Grid: (N, H, splits).
    """
    num_rows, heads, splits = scratch.evicted_lse.shape
    kv_heads, head_dim = pages.shape[1], pages.shape[-1]
    group = heads // kv_heads
    tiles = reload_tiles_for(group, head_dim)
    assert query.stride(2) == 1 and sequences.swap_blocks.stride(1) == 1 and pages[:1, :1].is_contiguous()
    reload_kernel[(num_rows, kv_heads, splits)](
        query, pages, rows.slot, rows.token, rows.end, sequences.start, sequences.stored, sequences.swap_blocks,
        sequences.codec, sequences.most_reads, scratch.evicted_out, scratch.evicted_lse, scratch.decision,
        scratch.similarity, scale, query.stride(0), query.stride(1), pages.stride(0), pages.stride(1),
        sequences.swap_blocks.stride(0), KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, SPLITS=splits,
        TILE_H=power_of_two(kv_heads), TILE_M=tiles.m, TILE_N=tiles.n, TILE_D=tiles.d, num_warps=tiles.warps,
        num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip


@triton.jit
def reload_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, pages, slot_of_row, token_of_row, end_of_row, start_of_slot, stored_of_slot, swap_blocks, codec_of_slot,
    most_reads, evicted_out, evicted_lse, decision, similarity, scale, query_token, query_head, page_block, page_head,
    table_slot,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, TILE_H: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a split of the evicted tokens of one (row, KV head), for all query heads of its group."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slot_of_row + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(end_of_row + row) <= tl.load(start_of_slot + slot):
        return
    if tl.load(codec_of_slot + slot) != 0:
        return
    if not reads(decision, similarity, most_reads, row, slot, kv_head, KV_HEADS, GROUP, TILE_H, TILE_M):
        return
    m, d = tl.arange(0, TILE_M), tl.arange(0, TILE_D)
    in_group, in_head = m < GROUP, d < HEAD_DIM
    head = kv_head * GROUP + m
    of_row = row * (KV_HEADS * GROUP) + head
    token = tl.load(token_of_row + row).to(tl.int64)
    q = tl.load(
        query + token * query_token + head[:, None] * query_head + d[None, :],
        mask=in_group[:, None] & in_head[None, :],
        other=0.0,
    )
    count = tl.load(stored_of_slot + slot).to(tl.int32)
    tiles = tl.cdiv(count, TILE_N)
    share = tl.cdiv(tiles, SPLITS)
    first = split * share
    last = tl.minimum(first + share, tiles)
    top = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    acc = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    block_ids = swap_blocks + slot * table_slot
    for tile in range(first, last):
        keys_t, values, exists = load_evicted(
            pages, block_ids, tile, count, kv_head, page_block, page_head, in_head, HEAD_DIM, TILE_N, TILE_D
        )
        top, total, acc = attend_tile(q, keys_t, values, exists, scale * LOG2_E, top, total, acc)
    store_partial(evicted_out, evicted_lse, top, total, acc, of_row, split, in_group, SPLITS, HEAD_DIM, TILE_D)


@triton.jit
def reads(  # type: ignore[no-untyped-def]
    decision, similarity, most_reads, row, slot, kv_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    TILE_H: tl.constexpr, TILE_M: tl.constexpr
):  # fmt: skip
    """Whether a KV head's evicted KV is read: a query head wants it and the read budget lets it."""
    m = tl.arange(0, TILE_M)
    choice = tl.load(decision + row * (KV_HEADS * GROUP) + kv_head * GROUP + m, mask=m < GROUP, other=0)
    wants = tl.max(choice, axis=0) >= RECOMPUTE
    return wants & (is_barred(similarity, row, kv_head, tl.load(most_reads + slot), KV_HEADS, TILE_H) == 0)


@triton.jit
def load_evicted(  # type: ignore[no-untyped-def]
    pages, block_ids, tile, count, kv_head, page_block, page_head, in_head, HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr, TILE_D: tl.constexpr
):  # fmt: skip
    """K^T [D, T], V [T, D] and which of them exist: tile number `tile` of a (sequence, KV head).

    pages: one layer's; block_ids: the sequence's swap blocks; count: its tokens. TILE_N divides SWAP_BLOCK_TOKENS, so
    a tile lies in one swap block, and is one contiguous run of whole pages.
    """
    token, d = tl.arange(0, TILE_N), tl.arange(0, TILE_D)
    tile = tl.full((), 0, dtype=tl.int32) + tile  # a loop counter is a Python number under the interpreter
    exists = tile * TILE_N + token < count
    block = tl.load(block_ids + tile // (SWAP_BLOCK_TOKENS // TILE_N)).to(tl.int64)
    run = block * page_block + kv_head * page_head + tile % (SWAP_BLOCK_TOKENS // TILE_N) * (2 * TILE_N * HEAD_DIM)
    offset = token // PAGE_TOKENS * (2 * PAGE_TOKENS * HEAD_DIM) + token % PAGE_TOKENS * HEAD_DIM
    keys_t = tl.load(pages + run + offset[None, :] + d[:, None], mask=exists[None, :] & in_head[:, None], other=0.0)
    values = tl.load(
        pages + run + PAGE_TOKENS * HEAD_DIM + offset[:, None] + d[None, :],
        mask=exists[:, None] & in_head[None, :],
        other=0.0,
    )
    return keys_t, values, exists
