"""What happens to a prompt that will be compacted, chunk by chunk, and then once when a layer has seen all of it.

Order within a layer: score, copy evicted KV out, calibrate from that copy (or sketch its keys, for recall by pages),
gather the kept tokens, scatter them. Blocks below g are only read, so they may be shared with other sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import attention_state
from vllm_calidrop.algorithm.policies import POLICIES, Needs, ScoreInputs, Selection
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.choice import column_sums_op, take_op
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.worker.prefill import PrefillRow, observe_window
from vllm_calidrop.worker.state_table import StateTable


def observe_chunk(row: PrefillRow, layer: int, queries: Tensor, cache: PackedCache, scale: float) -> None:
    """Remember what the policy will need of this chunk's queries [length, Hq, D]. Only prompt queries count."""
    record = row.sequence.record
    needs = POLICIES[record.policy].needs
    prompt_end = min(row.done + row.length, record.prompt_len)
    if Needs.COLUMN_SUMS in needs and row.done < prompt_end:
        sums = row.sequence.column_sums.get(layer)
        if sums is None:
            sums = torch.zeros((cache.num_kv_heads, record.prompt_len), dtype=torch.float32)
            row.sequence.column_sums[layer] = sums
        column_sums_op()(sums, queries[: prompt_end - row.done], row.blocks, cache, row.done, scale)
    if needs & Needs.WINDOW:
        observe_window(row, layer, queries, prompt_end)


def compact(
    row: PrefillRow,
    layer: int,
    last_query: Tensor,
    cache: PackedCache,
    pool: SwapPool,
    table: StateTable,
    recall: RecallStore,
    scale: float,
) -> Selection:
    """Compact one layer of a sequence that has attended its last known token; last_query: [Hq, D] of that token."""
    sequence, record = row.sequence, row.sequence.record
    needs = POLICIES[record.policy].needs
    window_queries, window_sums = sequence.window_queries.pop(layer, None), None
    if window_queries is not None and Needs.WINDOW_SUMS in needs:
        window_sums = torch.zeros((cache.num_kv_heads, record.prompt_len), dtype=torch.float32)
        before = record.prompt_len - record.window
        column_sums_op()(window_sums, window_queries, row.blocks, cache, before, scale)
    keys = _prompt_keys(row, cache) if Needs.KEYS in needs else None
    selection = POLICIES[record.policy].select(
        ScoreInputs(
            prompt_len=record.prompt_len,
            num_kv_heads=cache.num_kv_heads,
            budget=record.budget,
            window=record.window,
            sinks=record.sinks,
            pool_kernel=record.pool_kernel,
            scale=scale,
            device=cache.tensor.device,
            keys=keys,
            window_queries=window_queries if Needs.WINDOW_QUERIES in needs else None,
            window_sums=window_sums,
            column_sums=sequence.column_sums.pop(layer, None),
        ),
        record.stored,
    )
    if record.calibrated:
        evicted_keys, evicted_values = take_op()(cache, row.blocks, selection.evicted)
        refused = pool.write(layer, torch.tensor(record.swap_blocks), evicted_keys, evicted_values, record.codec)
        if record.recall is not None:
            recall.put_sketch(layer, record, evicted_keys, _prompt_keys(row, cache) if keys is None else keys)
        else:
            query = last_query.view(cache.num_kv_heads, -1, cache.head_dim)
            table.put(layer, record.slot, query, attention_state(query, evicted_keys, evicted_values, scale))
        if refused.any():
            table.refuse(layer, record.slot, refused)
            recall.refuse(layer, record.slot, refused)
    kept_keys, kept_values = take_op()(cache, row.blocks, selection.kept)
    position = torch.arange(record.prompt_len - record.budget, record.prompt_len)
    slots = row.blocks[position // cache.block_size].long() * cache.block_size + position % cache.block_size
    cache.write(kept_keys.transpose(0, 1).contiguous(), kept_values.transpose(0, 1).contiguous(), slots)
    return selection


def _prompt_keys(row: PrefillRow, cache: PackedCache) -> Tensor:
    """K [H, P, D] of the prompt, as attended (a copy)."""
    tokens = row.sequence.record.prompt_len
    return cache.read(row.blocks[None, : -(-tokens // cache.block_size)])[0][0, :, :tokens]
