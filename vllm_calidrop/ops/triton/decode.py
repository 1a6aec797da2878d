"""(a) Attention over the kept tokens, split along the tokens, and the gate, decided once in the same pass.

Meaning: `calibration.py::attention_state` over a row's tokens [start, end), `cosine` and `decide`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.ops.contract import KVCache, Rows, Sequences, State
from vllm_calidrop.ops.triton.attend import LOG2_E, attend_tile, store_partial
from vllm_calidrop.ops.triton.gate import PLAIN, decide
from vllm_calidrop.ops.triton.scratch import Scratch
from vllm_calidrop.ops.triton.tiles import tiles_for


def decode_kept(
    query: Tensor, cache: KVCache, rows: Rows, sequences: Sequences, state: State, scratch: Scratch, scale: float
) -> None:
    """States over parts of each row's kept tokens into scratch.kept_*, decisions into the rest of it but evicted_*.

    query: [tokens, Hq, D], stride(2) == 1, the dtype of the cache. Grid: (N, H, splits).
    """
    num_rows, heads, splits = scratch.kept_lse.shape
    key, value = cache
    kv_heads, block_size, head_dim = key.shape[1:]
    group = heads // kv_heads
    tiles = tiles_for(group, head_dim)
    assert query.stride(2) == 1 and rows.block_table.stride(1) == 1 and state.query.is_contiguous()
    decode_kernel[(num_rows, kv_heads, splits)](
        query, key, value, rows.block_table, rows.slot, rows.token, rows.end, sequences.start, sequences.stored,
        sequences.theta1, sequences.theta2, sequences.gate, state.query, scratch.kept_out, scratch.kept_lse,
        scratch.decision, scratch.similarity, scale, query.stride(0), query.stride(1), *key.stride(), *value.stride(),
        rows.block_table.stride(0), BLOCK_SIZE=block_size, KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
        SPLITS=splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_D=tiles.d, num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )  # fmt: skip


@triton.jit
def decode_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, key, value, block_table, slot_of_row, token_of_row, end_of_row, start_of_slot, stored_of_slot, theta1,
    theta2, gate, state_query, kept_out, kept_lse, decision, similarity, scale, query_token, query_head, key_block,
    key_head, key_token, key_d, value_block, value_head, value_token, value_d, table_row,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a split of the tokens of one (row, KV head), for all query heads of its group."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    end = tl.load(end_of_row + row)
    slot = tl.load(slot_of_row + row).to(tl.int64)
    start = tl.load(start_of_slot + slot, mask=slot >= 0, other=0)
    if end <= start:
        return
    m, d = tl.arange(0, TILE_M), tl.arange(0, TILE_D)
    in_group, in_head = m < GROUP, d < HEAD_DIM
    both = in_group[:, None] & in_head[None, :]
    token = tl.load(token_of_row + row).to(tl.int64)
    head = kv_head * GROUP + m
    q = tl.load(query + token * query_token + head[:, None] * query_head + d[None, :], mask=both, other=0.0)

    if split == 0:
        stored = tl.load(stored_of_slot + slot, mask=slot >= 0, other=0)
        choice = tl.zeros((TILE_M,), dtype=tl.int32) + PLAIN
        alike = tl.full((), float("inf"), dtype=tl.float32)
        if stored > 0:
            place = (slot * KV_HEADS + kv_head) * GROUP + m
            old = tl.load(state_query + place[:, None] * HEAD_DIM + d[None, :], mask=both, other=0.0)
            choice, alike = decide(
                q.to(tl.float32), old.to(tl.float32), tl.load(theta1 + slot), tl.load(theta2 + slot),
                tl.load(gate + slot), in_group, GROUP,
            )  # fmt: skip
        tl.store(decision + row * (KV_HEADS * GROUP) + head, choice, mask=in_group)
        tl.store(similarity + row * KV_HEADS + kv_head, alike)

    share = tl.cdiv(tl.cdiv(end - start, SPLITS), TILE_N) * TILE_N
    first = start + split * share
    last = tl.minimum(first + share, end)
    top = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    acc = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    table = block_table + row * table_row
    for begin in range(first, last, TILE_N):
        position = begin + tl.arange(0, TILE_N)
        valid = position < last
        block = tl.load(table + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        within = position % BLOCK_SIZE
        key_at = block * key_block + kv_head * key_head + within * key_token
        keys_t = tl.load(key + key_at[None, :] + d[:, None] * key_d, mask=valid[None, :] & in_head[:, None], other=0.0)
        value_at = block * value_block + kv_head * value_head + within * value_token
        values = tl.load(
            value + value_at[:, None] + d[None, :] * value_d, mask=valid[:, None] & in_head[None, :], other=0.0
        )
        top, total, acc = attend_tile(q, keys_t, values, valid, scale * LOG2_E, top, total, acc)
    store_partial(
        kept_out, kept_lse, top, total, acc, row * (KV_HEADS * GROUP) + head, split, in_group, SPLITS, HEAD_DIM, TILE_D
    )
