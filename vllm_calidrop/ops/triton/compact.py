"""(e) What compaction moves, for all KV heads at once: evicted KV into swap pages, kept KV to the end of the prompt.

Order (docs/life-of-a-request.md): `copy_evicted`, `calibrate`, `gather_kept`, `scatter_kept`. Kept tokens go by way of
scratch, because a head's program would overwrite tokens that another has not read yet. Positions per KV head come from
`policies/base.py::Policy.select`, ascending.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.ops.contract import KVCache
from vllm_calidrop.ops.triton.reload import PAGE_TOKENS, SWAP_BLOCK_TOKENS
from vllm_calidrop.ops.triton.tiles import power_of_two

TILE_N = 32


def copy_evicted(cache: KVCache, blocks: Tensor, positions: Tensor, pages: Tensor, swap_blocks: Tensor) -> None:
    """Copy tokens `positions` [H, m] of the sequence with block table `blocks` [columns] into its swap blocks.

    positions: int64, contiguous. pages: one layer of the swap pool (contract of `reload_evicted`), written by the
    kernel itself where it is pinned host memory, or a staging buffer of the same layout with swap_blocks 0, 1, ...
    swap_blocks: int [>= ceil(m / SWAP_BLOCK_TOKENS)]. A program writes whole pages of a head, one contiguous run each;
    the rest of the last page becomes zero, pages and blocks beyond it stay as they were. Grid: (pages, H).
    """
    key, value = cache
    kv_heads, block_size, head_dim = key.shape[1:]
    count = positions.shape[1]
    assert positions.is_contiguous() and blocks.stride(0) == 1 and swap_blocks.stride(0) == 1
    assert pages[:1, :1].is_contiguous() and swap_blocks.numel() * SWAP_BLOCK_TOKENS.value >= count
    copy_evicted_kernel[(triton.cdiv(count, PAGE_TOKENS.value), kv_heads)](
        key, value, blocks, positions, pages, swap_blocks, count, *key.stride(), *value.stride(), pages.stride(0),
        pages.stride(1), BLOCK_SIZE=block_size, HEAD_DIM=head_dim, TILE_D=power_of_two(head_dim), num_warps=4,
    )  # fmt: skip


def gather_kept(cache: KVCache, blocks: Tensor, positions: Tensor, scratch: Tensor) -> None:
    """Copy tokens `positions` [H, n] into scratch [2 (K, V), H, n, D], contiguous, dtype of the cache. Grid: (n, H)."""
    key, value = cache
    kv_heads, block_size, head_dim = key.shape[1:]
    count = positions.shape[1]
    assert positions.is_contiguous() and scratch.is_contiguous() and scratch.shape == (2, kv_heads, count, head_dim)
    gather_kernel[(triton.cdiv(count, TILE_N), kv_heads)](
        key, value, blocks, positions, scratch, count, *key.stride(), *value.stride(), BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, TILE_N=TILE_N, TILE_D=power_of_two(head_dim), num_warps=4,
    )  # fmt: skip


def scatter_kept(cache: KVCache, blocks: Tensor, first_position: int, scratch: Tensor) -> None:
    """Store scratch [2, H, n, D] as tokens [first_position, first_position + n) of every KV head. Grid: (n, H)."""
    key, value = cache
    kv_heads, block_size, head_dim = key.shape[1:]
    count = scratch.shape[2]
    assert scratch.is_contiguous() and scratch.shape == (2, kv_heads, count, head_dim) and blocks.stride(0) == 1
    scatter_kernel[(triton.cdiv(count, TILE_N), kv_heads)](
        key, value, blocks, scratch, first_position, count, *key.stride(), *value.stride(), BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, TILE_N=TILE_N, TILE_D=power_of_two(head_dim), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def copy_evicted_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    key, value, blocks, positions, pages, swap_blocks, count, key_block, key_head, key_token, key_d, value_block,
    value_head, value_token, value_d, page_block, page_head,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: one page of one KV head."""
    page, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, d = tl.arange(0, PAGE_TOKENS), tl.arange(0, TILE_D)
    in_head = (d < HEAD_DIM)[None, :]
    index = page * PAGE_TOKENS + token
    exists = index < count
    position = tl.load(positions + kv_head * count + index, mask=exists, other=0)
    mask = exists[:, None] & in_head
    keys = load_tokens(
        key, blocks, position, exists, kv_head, key_block, key_head, key_token, key_d, d, mask, BLOCK_SIZE
    )
    values = load_tokens(
        value, blocks, position, exists, kv_head, value_block, value_head, value_token, value_d, d, mask, BLOCK_SIZE
    )
    block = tl.load(swap_blocks + page // (SWAP_BLOCK_TOKENS // PAGE_TOKENS)).to(tl.int64)
    within = page % (SWAP_BLOCK_TOKENS // PAGE_TOKENS) * (2 * PAGE_TOKENS * HEAD_DIM)
    run = pages + block * page_block + kv_head * page_head + within + token[:, None] * HEAD_DIM + d[None, :]
    everywhere = in_head & (token >= 0)[:, None]
    tl.store(run, keys, mask=everywhere)
    tl.store(run + PAGE_TOKENS * HEAD_DIM, values, mask=everywhere)


@triton.jit(do_not_specialize=["count"])
def gather_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    key, value, blocks, positions, scratch, count, key_block, key_head, key_token, key_d, value_block, value_head,
    value_token, value_d,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: some kept tokens of one KV head."""
    kv_head, d = tl.program_id(1).to(tl.int64), tl.arange(0, TILE_D)
    index = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    exists = index < count
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    position = tl.load(positions + kv_head * count + index, mask=exists, other=0)
    keys = load_tokens(
        key, blocks, position, exists, kv_head, key_block, key_head, key_token, key_d, d, mask, BLOCK_SIZE
    )
    values = load_tokens(
        value, blocks, position, exists, kv_head, value_block, value_head, value_token, value_d, d, mask, BLOCK_SIZE
    )
    at = scratch + (kv_head * count + index)[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, keys, mask=mask)
    tl.store(at + KV_HEADS * count * HEAD_DIM, values, mask=mask)


@triton.jit(do_not_specialize=["count", "first_position"])
def scatter_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    key, value, blocks, scratch, first_position, count, key_block, key_head, key_token, key_d, value_block, value_head,
    value_token, value_d,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: some kept tokens of one KV head."""
    kv_head, d = tl.program_id(1).to(tl.int64), tl.arange(0, TILE_D)
    index = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    exists = index < count
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    at = scratch + (kv_head * count + index)[:, None] * HEAD_DIM + d[None, :]
    keys = tl.load(at, mask=mask, other=0.0)
    values = tl.load(at + KV_HEADS * count * HEAD_DIM, mask=mask, other=0.0)
    position = first_position + index
    block = tl.load(blocks + position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    within = position % BLOCK_SIZE
    key_at = block * key_block + kv_head * key_head + within * key_token
    value_at = block * value_block + kv_head * value_head + within * value_token
    tl.store(key + key_at[:, None] + d[None, :] * key_d, keys, mask=mask)
    tl.store(value + value_at[:, None] + d[None, :] * value_d, values, mask=mask)


@triton.jit
def load_tokens(  # type: ignore[no-untyped-def]
    cache, blocks, position, exists, kv_head, block_stride, head_stride, token_stride, d_stride, d, mask,
    BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """[T, D]: K or V of tokens at positions [T], found by the block table; zero where masked."""
    block = tl.load(blocks + position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    at = block * block_stride + kv_head * head_stride + position % BLOCK_SIZE * token_stride
    return tl.load(cache + at[:, None] + d[None, :] * d_stride, mask=mask, other=0.0)
