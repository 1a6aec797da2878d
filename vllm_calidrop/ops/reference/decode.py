"""Decode over a compacted prompt on CPU, in torch: the kept tokens' state, the gate, recomputation, merge."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, attention_state, cosine, decide, merge_states
from vllm_calidrop.algorithm.policies import h2o
from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.worker.measures import observe_similarity
from vllm_calidrop.worker.state_table import StateTable

# Pairs of (sequence, KV head) are recomputed in groups of at most this many tokens, which bounds the copies.
RECOMPUTE_TOKENS = 1 << 17


def decode(
    rows: DecodeRows,
    layer: int,
    queries: Tensor,
    cache: PackedCache,
    pool: SwapPool,
    table: StateTable,
    scale: float,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Algorithm 2 for all rows of one layer. queries: [N, Hq, D]; returns [N, Hq, D]: `out` if given, else float32.

    lse: float32 [N, Hq], filled with the log-sum-exp of all that was attended if given.
    """
    num_rows, num_heads, head_dim = queries.shape
    grouped = queries.view(num_rows, cache.num_kv_heads, -1, head_dim)
    keys, values = cache.read(rows.blocks)
    state = attention_state(grouped, keys, values, scale, rows.valid[:, None])
    if rows.calibrated.numel():
        mine = rows.calibrated
        kept = AttentionState(state.out[mine], state.lse[mine])
        calibrated = _calibrate(rows, layer, grouped[mine], kept, pool, table, scale)
        state.out[mine], state.lse[mine] = calibrated.out, calibrated.lse
    if lse is not None:
        lse.copy_(state.lse.flatten(1))
    attended = state.out.reshape(num_rows, num_heads, head_dim)
    return attended if out is None else out.copy_(attended)


def add_column_sums(
    sums: Tensor, queries: Tensor, blocks: Tensor, cache: PackedCache, first_position: int, scale: float
) -> None:
    """Add the causal attention of consecutive prompt queries [q, Hq, D] to `sums` [H, P] (policies/h2o.py).

    blocks: int32, the sequence's block table.
    """
    tokens = first_position + len(queries)
    keys, _ = cache.read(blocks[None, : -(-tokens // cache.block_size)])
    h2o.add_column_sums(sums, queries, keys[0, :, :tokens], first_position, scale)


def _calibrate(
    rows: DecodeRows,
    layer: int,
    query: Tensor,
    kept: AttentionState,
    pool: SwapPool,
    table: StateTable,
    scale: float,
) -> AttentionState:
    """Gate, recompute, merge for the M rows with a calibration state; query [M, H, G, D]."""
    slots = rows.calibrated_slots
    rho = cosine(query, table.query[layer, slots])
    observe_similarity(table.similarity, rho)
    decision = decide(rho, rows.theta1, rows.theta2, rows.gate, rows.most_reads)
    table.count(layer, slots, decision)

    row, kv_head = torch.nonzero(decision.recompute.any(-1), as_tuple=True)
    if rows.codec is None:
        _recompute_all(rows, layer, query, decision.recompute, row, kv_head, 0, pool, table, scale)
    else:
        for codec in rows.codec[row].unique().tolist():
            mine = rows.codec[row] == codec
            _recompute_all(rows, layer, query, decision.recompute, row[mine], kv_head[mine], codec, pool, table, scale)

    uses_evicted = decision.recompute | decision.merge
    evicted = AttentionState(table.out[layer, slots], table.lse[layer, slots].masked_fill(~uses_evicted, -torch.inf))
    return merge_states(kept, evicted)


def _recompute_all(
    rows: DecodeRows, layer: int, query: Tensor, recompute: Tensor, row: Tensor, kv_head: Tensor, codec: int,
    pool: SwapPool, table: StateTable, scale: float,
) -> None:  # fmt: skip
    """Read the evicted KV of (row, KV head) pairs whose rows have the codec of this number, some pairs at a time."""
    if not row.numel():
        return
    tokens = pool.codecs[codec].tokens_per_block
    blocks = -(-int(rows.stored[row].max()) // tokens)
    at_once = blocks if codec == 0 else 1  # what is decoded is a block of each pair, never all of it
    step = max(1, RECOMPUTE_TOKENS // (at_once * tokens))
    for pairs in zip(row.split(step), kv_head.split(step)):
        _recompute(rows, layer, query, recompute, *pairs, codec, blocks, at_once, pool, table, scale)


def _recompute(
    rows: DecodeRows, layer: int, query: Tensor, recompute: Tensor, row: Tensor, kv_head: Tensor, codec: int,
    blocks: int, at_once: int, pool: SwapPool, table: StateTable, scale: float,
) -> None:  # fmt: skip
    """Renew the states of the heads that asked for it, over `blocks` swap blocks of each pair."""
    asked = query[row, kv_head]
    state = AttentionState(torch.zeros(asked.shape), torch.full(asked.shape[:-1], -torch.inf))
    for first in range(0, blocks, at_once):
        keys, values = pool.read(layer, rows.swap_blocks[row, first : first + at_once], kv_head, codec)
        token = first * pool.codecs[codec].tokens_per_block + torch.arange(keys.shape[1])
        part = attention_state(asked, keys, values, scale, token < rows.stored[row, None])
        state = part if at_once == blocks else merge_states(state, part)
    pair, head = torch.nonzero(recompute[row, kv_head], as_tuple=True)
    where = (layer, rows.calibrated_slots[row[pair]], kv_head[pair], head)
    table.query[where] = asked[pair, head]
    table.out[where] = state.out[pair, head]
    table.lse[where] = state.lse[pair, head]
