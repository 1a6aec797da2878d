"""A decode step over compacted prompts in torch (Algorithm 2): the kept tokens' state, the gate, what it asks for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, attention_state, cosine, decide, merge_states
from vllm_calidrop.ops.base import Tables
from vllm_calidrop.ops.contract import NO_BUDGET, Rows
from vllm_calidrop.ops.reference.recall import recalled_state
from vllm_calidrop.ops.similarity import observe_similarity
from vllm_calidrop.ops.state import count_decision

# Pairs of (sequence, KV head) are recomputed in groups of at most this many tokens, which bounds the copies.
RECOMPUTE_TOKENS = 1 << 17


class ReadableCache(Protocol):
    """A layer's cache that is read by block table (packed.py, strided.py)."""

    block_size: int

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]: ...


def decode_rows(
    query: Tensor, out: Tensor, cache: ReadableCache, layer: int, rows: Rows, tables: Tables, scale: float
) -> None:
    """The decode step of one layer; query, out: [tokens, Hq, D]."""
    slot = rows.slot.long()
    start = torch.where(slot >= 0, tables.sequences.start[slot.clamp_min(0)], 0)
    real = torch.nonzero(rows.end > start).flatten()
    if not real.numel():
        return
    token, slot, start, end = rows.token[real].long(), slot[real], start[real], rows.end[real]
    grouped = query[token].unflatten(1, tables.states[layer].lse.shape[1:])  # [N, H, G, D]
    state = _kept_state(grouped, cache, rows.block_table[real], start, end, scale)
    of_slot = slot.clamp_min(0)
    for stored, evicted_state in (
        (tables.sequences.stored[of_slot], _calibrated_state),
        (tables.recall.stored[of_slot], recalled_state),
    ):
        mine = torch.nonzero((stored > 0) & (slot >= 0)).flatten()
        if mine.numel():
            evicted = evicted_state(layer, slot[mine], grouped[mine], state.lse[mine], tables, scale)
            merged = merge_states(AttentionState(state.out[mine], state.lse[mine]), evicted)
            state.out[mine], state.lse[mine] = merged
    out[token] = state.out.flatten(1, 2).to(out.dtype)


def _kept_state(
    query: Tensor, cache: ReadableCache, block_table: Tensor, start: Tensor, end: Tensor, scale: float
) -> AttentionState:
    """State of query [N, H, G, D] over tokens [start, end) of every row; block_table: [N, C]."""
    first = start // cache.block_size
    last = (end - 1) // cache.block_size
    column = first[:, None] + torch.arange(int((last - first).max()) + 1, device=first.device)
    # Columns past a row's own end may hold anything: the row's last block stands for them.
    blocks = block_table.gather(1, torch.minimum(column, last[:, None]).long())
    keys, values = cache.read(blocks)
    token = column.unsqueeze(-1) * cache.block_size + torch.arange(cache.block_size, device=first.device)
    valid = (token >= start[:, None, None]) & (token < end[:, None, None])
    return attention_state(query, keys, values, scale, valid.flatten(1)[:, None])


def _calibrated_state(
    layer: int, slots: Tensor, query: Tensor, _kept_lse: Tensor, tables: Tables, scale: float
) -> AttentionState:
    """Gate and recomputation for M rows with a calibration state, and what they then merge; query [M, H, G, D]."""
    sequences, state = tables.sequences, tables.states[layer]
    rho = cosine(query, state.query[slots])
    observe_similarity(tables.similarity, rho)
    most = sequences.most_reads[slots]
    budget = most if bool((most < NO_BUDGET).any()) else None
    decision = decide(rho, sequences.theta1[slots], sequences.theta2[slots], sequences.gate[slots], budget)
    count_decision(state, slots, decision)

    row, kv_head = torch.nonzero(decision.recompute.any(-1), as_tuple=True)
    codecs = sequences.codec[slots[row]]
    for codec in codecs.unique().tolist():
        mine = codecs == codec
        _recompute_all(layer, slots, query, decision.recompute, row[mine], kv_head[mine], codec, tables, scale)

    uses_evicted = decision.recompute | decision.merge
    return AttentionState(state.out[slots], state.lse[slots].masked_fill(~uses_evicted, -torch.inf))


def _recompute_all(
    layer: int, slots: Tensor, query: Tensor, recompute: Tensor, row: Tensor, kv_head: Tensor, codec: int,
    tables: Tables, scale: float,
) -> None:  # fmt: skip
    """Read the evicted KV of (row, KV head) pairs whose rows have the codec of this number, some pairs at a time."""
    tokens = tables.pool.codecs[codec].tokens_per_block
    blocks = -(-int(tables.sequences.stored[slots[row]].max()) // tokens)
    at_once = blocks if codec == 0 else 1  # what is decoded is a block of each pair, never all of it
    step = max(1, RECOMPUTE_TOKENS // (at_once * tokens))
    for pairs in zip(row.split(step), kv_head.split(step)):
        _recompute(layer, slots, query, recompute, *pairs, codec, blocks, at_once, tables, scale)


def _recompute(
    layer: int, slots: Tensor, query: Tensor, recompute: Tensor, row: Tensor, kv_head: Tensor, codec: int, blocks: int,
    at_once: int, tables: Tables, scale: float,
) -> None:  # fmt: skip
    """Renew the states of the heads that asked for it, over `blocks` swap blocks of each pair."""
    sequences, pool, asked = tables.sequences, tables.pool, query[row, kv_head]
    swap_blocks, stored = sequences.swap_blocks[slots[row]], sequences.stored[slots[row]]
    fresh = AttentionState(
        torch.zeros(asked.shape, device=asked.device),
        torch.full(asked.shape[:-1], -torch.inf, device=asked.device),
    )
    for first in range(0, blocks, at_once):
        read = pool.read(layer, swap_blocks[:, first : first + at_once].cpu(), kv_head.cpu(), codec)
        keys, values = (x.to(asked.device) for x in read)
        token = first * pool.codecs[codec].tokens_per_block + torch.arange(keys.shape[1], device=asked.device)
        part = attention_state(asked, keys, values, scale, token < stored[:, None])
        fresh = part if at_once == blocks else merge_states(fresh, part)
    pair, head = torch.nonzero(recompute[row, kv_head], as_tuple=True)
    where, state = (slots[row[pair]], kv_head[pair], head), tables.states[layer]
    state.query[where] = asked[pair, head]
    state.out[where] = fresh.out[pair, head]
    state.lse[where] = fresh.lse[pair, head]
