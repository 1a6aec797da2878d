"""The first calibration state of a sequence: attention of one query over evicted tokens still in the paged cache.

Compaction does this once per layer, between `copy_evicted` and `scatter_kept`, so that nothing is read back from the
host. Meaning: `calibration.py::attention_state`, then `StateTable.put`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.ops.contract import KVCache, State
from vllm_calidrop.ops.triton.attend import LOG2_E, attend_tile, store_partial
from vllm_calidrop.ops.triton.merge import combine_splits
from vllm_calidrop.ops.triton.scratch import Scratch
from vllm_calidrop.ops.triton.tiles import power_of_two, tiles_for


def calibrate(
    query: Tensor, cache: KVCache, blocks: Tensor, positions: Tensor, state: State, slot: int, scratch: Scratch,
    scale: float,
) -> None:  # fmt: skip
    """Store the state of `query` [Hq, D] over tokens `positions` [H, m] (m may be 0) in slot `slot`.

    query: stride(1) == 1; blocks: int [columns], the sequence's block table; positions: int64, contiguous; scratch:
    `view_scratch` for one row. Grids: (H, splits), (Hq).
    """
    key, value = cache
    kv_heads, block_size, head_dim = key.shape[1:]
    heads = query.shape[0]
    group, splits = heads // kv_heads, scratch.evicted_lse.shape[2]
    tiles = tiles_for(group, head_dim)
    assert (
        query.stride(1) == 1
        and blocks.stride(0) == 1
        and positions.is_contiguous()
        and scratch.evicted_lse.shape[0] == 1
    )
    indexed_kernel[(kv_heads, splits)](
        query, key, value, blocks, positions, scratch.evicted_out, scratch.evicted_lse, positions.shape[1], scale,
        query.stride(0), *key.stride(), *value.stride(), BLOCK_SIZE=block_size, GROUP=group, HEAD_DIM=head_dim,
        SPLITS=splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_D=tiles.d, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    put_kernel[(heads,)](
        query, scratch.evicted_out, scratch.evicted_lse, state.query[slot], state.out[slot], state.lse[slot],
        query.stride(0), HEAD_DIM=head_dim, SPLITS=splits, TILE_D=power_of_two(head_dim), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def indexed_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, key, value, blocks, positions, partial_out, partial_lse, count, scale, query_head, key_block, key_head,
    key_token, key_d, value_block, value_head, value_token, value_d,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a split of one KV head's positions, for all query heads of its group."""
    kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, d = tl.arange(0, TILE_M), tl.arange(0, TILE_D)
    in_group, in_head = m < GROUP, d < HEAD_DIM
    head = kv_head * GROUP + m
    q = tl.load(query + head[:, None] * query_head + d[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
    share = tl.cdiv(tl.cdiv(count, SPLITS), TILE_N) * TILE_N
    first = split * share
    last = tl.minimum(first + share, count)
    top = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    acc = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    for begin in range(first, last, TILE_N):
        index = begin + tl.arange(0, TILE_N)
        valid = index < last
        position = tl.load(positions + kv_head * count + index, mask=valid, other=0)
        block = tl.load(blocks + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        within = position % BLOCK_SIZE
        key_at = block * key_block + kv_head * key_head + within * key_token
        keys_t = tl.load(key + key_at[None, :] + d[:, None] * key_d, mask=valid[None, :] & in_head[:, None], other=0.0)
        value_at = block * value_block + kv_head * value_head + within * value_token
        values = tl.load(
            value + value_at[:, None] + d[None, :] * value_d, mask=valid[:, None] & in_head[None, :], other=0.0
        )
        top, total, acc = attend_tile(q, keys_t, values, valid, scale * LOG2_E, top, total, acc)
    store_partial(partial_out, partial_lse, top, total, acc, head, split, in_group, SPLITS, HEAD_DIM, TILE_D)


@triton.jit
def put_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, partial_out, partial_lse, state_query, state_out, state_lse, query_head,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: one query head."""
    head, d = tl.program_id(0), tl.arange(0, TILE_D)
    in_head = d < HEAD_DIM
    out, log = combine_splits(partial_out, partial_lse, head, d, in_head, SPLITS, HEAD_DIM)
    q = tl.load(query + head * query_head + d, mask=in_head, other=0.0)
    tl.store(state_query + head * HEAD_DIM + d, q, mask=in_head)
    tl.store(state_out + head * HEAD_DIM + d, out, mask=in_head)
    tl.store(state_lse + head, log)
