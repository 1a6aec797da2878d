"""How a tile of evicted tokens is found in the swap pool: the one place that knows its pages (cache/swap.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_calidrop.cache import layout

PAGE_TOKENS: tl.constexpr = tl.constexpr(layout.PAGE_TOKENS)
SWAP_BLOCK_TOKENS: tl.constexpr = tl.constexpr(layout.SWAP_BLOCK_TOKENS)


@triton.jit
def load_evicted(  # type: ignore[no-untyped-def]
    pages, block_ids, first, count, kv_head, page_block, page_head, in_head, HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr, TILE_D: tl.constexpr
):  # fmt: skip
    """K^T [D, T], V [T, D] and which of them exist: tokens [first, first + T) of a (sequence, KV head), below `count`.

    pages: one layer's; block_ids: the sequence's swap blocks. A tile lies in one swap block: `first` is a multiple of
    TILE_N, which divides SWAP_BLOCK_TOKENS. Of a tile's KV every page is one contiguous run of 2 * PAGE_TOKENS * D.
    """
    token, d = tl.arange(0, TILE_N), tl.arange(0, TILE_D)
    first = tl.full((), 0, dtype=tl.int32) + first  # a loop counter is a Python number under the interpreter
    exists = first + token < count
    block = tl.load(block_ids + first // SWAP_BLOCK_TOKENS).to(tl.int64)
    page = first % SWAP_BLOCK_TOKENS // PAGE_TOKENS
    run = block * page_block + kv_head * page_head + page * (2 * PAGE_TOKENS * HEAD_DIM)
    offset = token // PAGE_TOKENS * (2 * PAGE_TOKENS * HEAD_DIM) + token % PAGE_TOKENS * HEAD_DIM
    keys_t = tl.load(pages + run + offset[None, :] + d[:, None], mask=exists[None, :] & in_head[:, None], other=0.0)
    values = tl.load(
        pages + run + PAGE_TOKENS * HEAD_DIM + offset[:, None] + d[None, :],
        mask=exists[:, None] & in_head[None, :],
        other=0.0,
    )
    return keys_t, values, exists
