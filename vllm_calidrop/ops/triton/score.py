"""(d) Scores of prompt tokens: the attention every key received, summed over queries, without a queries x keys matrix.

Two passes over the keys, read through the block table: the log-sum-exp of every query, then every key's column sum. H2O
sums all prompt queries, chunk by chunk; SnapKV's votes are the same sum over its window. Meaning:
`policies/h2o.py::add_column_sums`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.ops.contract import KVCache
from vllm_calidrop.ops.triton.attend import LOG2_E, dot
from vllm_calidrop.ops.triton.scratch import MAX_SPLITS, PROGRAMS
from vllm_calidrop.ops.triton.tiles import power_of_two

# Pairs of (query, head of the group) and keys of a tile.
TILE_M, TILE_N = 64, 64


def score_splits(queries: int, kv_heads: int, group: int) -> int:
    """Splits of the keys in the first pass: enough programs for a window of few queries, one for a long chunk."""
    programs = triton.cdiv(queries * group, TILE_M) * kv_heads
    return max(1, min(MAX_SPLITS, power_of_two(PROGRAMS // programs)))


def score_scratch_elements(queries: int, kv_heads: int, group: int) -> int:
    """float32 elements that `add_column_sums` needs as scratch for that many queries."""
    return queries * group * kv_heads * score_splits(queries, kv_heads, group)


def add_column_sums(
    sums: Tensor, queries: Tensor, cache: KVCache, blocks: Tensor, first_position: int, scale: float, scratch: Tensor
) -> None:
    """Add the causal softmax attention of consecutive prompt queries to `sums`, mean over each group's heads.

    sums: float32 [H, P], stride(1) == 1, changed in place. queries: [q, Hq, D], stride(2) == 1, at positions
    first_position, first_position + 1, ...; first_position + q <= P. blocks: int [columns], the sequence's block table.
    scratch: float32 [>= score_scratch_elements], contiguous. Grids: (queries, H, splits), (keys, H).
    """
    key = cache.key
    kv_heads, block_size, head_dim = key.shape[1:]
    count = len(queries)
    group = queries.shape[1] // kv_heads
    splits = score_splits(count, kv_heads, group)
    keys = first_position + count
    assert sums.stride(1) == 1 and queries.stride(2) == 1 and blocks.stride(0) == 1 and keys <= sums.shape[1]
    assert scratch.is_contiguous() and scratch.numel() >= score_scratch_elements(count, kv_heads, group)
    sizes = {
        "BLOCK_SIZE": block_size, "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "SPLITS": splits,
        "TILE_M": TILE_M, "TILE_N": TILE_N if head_dim <= 128 else 32, "TILE_D": max(16, power_of_two(head_dim)),
    }  # fmt: skip
    strides = (queries.stride(0), queries.stride(1), *key.stride())
    query_lse_kernel[(triton.cdiv(count * group, TILE_M), kv_heads, splits)](
        queries, key, blocks, scratch, count, first_position, scale, *strides, **sizes, num_warps=4, num_stages=2
    )
    column_sum_kernel[(triton.cdiv(keys, sizes["TILE_N"]), kv_heads)](
        queries, key, blocks, scratch, sums, count, first_position, scale, *strides, sums.stride(0), **sizes,
        num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "first_position"])
def query_lse_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    queries, key, blocks, partial, count, first_position, scale, query_token, query_head, key_block, key_head,
    key_token, key_d,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of (query, head) pairs of a KV head over a split of the keys before its last query.

    partial: float32 [H, count * GROUP, SPLITS], log-sum-exp to the base 2; -inf for a split without keys.
    """
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    d = tl.arange(0, TILE_D)
    in_head = d < HEAD_DIM
    exists = pair < count * GROUP
    q = load_pairs(queries, pair, exists, kv_head, query_token, query_head, d, in_head, GROUP)
    position = first_position + pair // GROUP
    keys = first_position + tl.minimum(count, tl.cdiv((tl.program_id(0) + 1) * TILE_M, GROUP))
    share = tl.cdiv(tl.cdiv(keys, SPLITS), TILE_N) * TILE_N
    first = split * share
    last = tl.minimum(first + share, keys)
    top = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    for begin in range(first, last, TILE_N):
        token = begin + tl.arange(0, TILE_N)
        keys_t = load_keys_t(
            key, blocks, token, token < last, kv_head, key_block, key_head, key_token, key_d, d, in_head, BLOCK_SIZE
        )
        seen = (token[None, :] <= position[:, None]) & (token < last)[None, :]
        logits = tl.where(seen, dot(q, keys_t) * (scale * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        top = new_top
    log = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(partial + (kv_head * count * GROUP + pair) * SPLITS + split, log, mask=exists)


@triton.jit(do_not_specialize=["count", "first_position"])
def column_sum_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    queries, key, blocks, partial, sums, count, first_position, scale, query_token, query_head, key_block, key_head,
    key_token, key_d, sums_head,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of keys of a KV head, over all pairs that see them. No other program adds to these sums."""
    kv_head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    in_prompt = token < first_position + count
    d = tl.arange(0, TILE_D)
    in_head = d < HEAD_DIM
    keys_t = load_keys_t(
        key, blocks, token, in_prompt, kv_head, key_block, key_head, key_token, key_d, d, in_head, BLOCK_SIZE
    )
    received = tl.zeros((TILE_N,), dtype=tl.float32)
    first = tl.maximum(0, tl.program_id(0) * TILE_N - first_position) * GROUP // TILE_M
    for tile in range(first, tl.cdiv(count * GROUP, TILE_M)):
        pair = tile * TILE_M + tl.arange(0, TILE_M)
        exists = pair < count * GROUP
        q = load_pairs(queries, pair, exists, kv_head, query_token, query_head, d, in_head, GROUP)
        lse = combine_logs(partial, kv_head * count * GROUP + pair, exists, SPLITS)
        seen = (token[None, :] <= (first_position + pair // GROUP)[:, None]) & exists[:, None]
        logits = tl.where(seen, dot(q, keys_t) * (scale * LOG2_E) - lse[:, None], float("-inf"))
        received += tl.sum(tl.exp2(logits), axis=0)
    at = sums + kv_head * sums_head + token
    tl.store(at, tl.load(at, mask=in_prompt, other=0.0) + received / GROUP, mask=in_prompt)


@triton.jit
def load_pairs(  # type: ignore[no-untyped-def]
    queries, pair, exists, kv_head, query_token, query_head, d, in_head, GROUP: tl.constexpr
):
    """[M, D]: pair p is query p // GROUP of head p % GROUP of the KV head's group."""
    at = (pair // GROUP).to(tl.int64) * query_token + (kv_head * GROUP + pair % GROUP) * query_head
    return tl.load(queries + at[:, None] + d[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)


@triton.jit
def load_keys_t(  # type: ignore[no-untyped-def]
    key, blocks, token, exists, kv_head, key_block, key_head, key_token, key_d, d, in_head, BLOCK_SIZE: tl.constexpr
):
    """[D, N]: keys of the tokens, found by the block table."""
    block = tl.load(blocks + token // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    at = block * key_block + kv_head * key_head + token % BLOCK_SIZE * key_token
    return tl.load(key + at[None, :] + d[:, None] * key_d, mask=exists[None, :] & in_head[:, None], other=0.0)


@triton.jit
def combine_logs(partial, place, exists, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log-sum-exp to the base 2 over the splits of pairs [M]; 0 for pairs that do not exist."""
    at = partial + place[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    logs = tl.load(at, mask=exists[:, None], other=0.0)
    top = tl.max(logs, axis=1)
    return top + tl.log2(tl.sum(tl.exp2(logs - top[:, None]), axis=1))
