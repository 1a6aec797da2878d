"""How a tile of evicted tokens is found in the swap pool: the one place that knows its pages (cache/swap.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_calidrop.evicted import layout

PAGE_TOKENS: tl.constexpr = tl.constexpr(layout.PAGE_TOKENS)
SWAP_BLOCK_TOKENS: tl.constexpr = tl.constexpr(layout.SWAP_BLOCK_TOKENS)


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
