"""A prompt's compaction on the device: the same order as attention/compaction.py, on the compute stream, never waiting.

Score, copy evicted KV out, calibrate from the copy, gather the kept tokens, scatter them. Everything is put on the
stream before the blocks are freed by the scheduler and used again, so their next owner's writes come after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.attention.cuda.host_pool import PinnedSwapPool
from vllm_calidrop.attention.cuda.plain_cache import PlainCache
from vllm_calidrop.attention.prefill import PrefillRow, observe_window
from vllm_calidrop.cache.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS
from vllm_calidrop.calibration import attention_state
from vllm_calidrop.policies import POLICIES, ScoreInputs, Selection
from vllm_calidrop.policies.h2o import add_column_sums
from vllm_calidrop.state_table import StateTable


def observe_chunk(row: PrefillRow, layer: int, queries: Tensor, cache: PlainCache, scale: float) -> None:
    """Remember what the policy will need of this chunk's queries [length, Hq, D]. Only prompt queries count."""
    record = row.sequence.record
    policy = POLICIES[record.policy]
    prompt_end = min(row.done + row.length, record.prompt_len)
    if policy.needs_column_sums and row.done < prompt_end:
        sums = row.sequence.column_sums.get(layer)
        if sums is None:
            sums = torch.zeros((cache.num_kv_heads, record.prompt_len), dtype=torch.float32, device=queries.device)
            row.sequence.column_sums[layer] = sums
        keys, _ = cache.read(row.blocks, prompt_end)
        add_column_sums(sums, queries[: prompt_end - row.done], keys, row.done, scale)
    if policy.needs_window_queries:
        observe_window(row, layer, queries, prompt_end)


def compact(
    row: PrefillRow,
    layer: int,
    last_query: Tensor,
    cache: PlainCache,
    pool: PinnedSwapPool,
    table: StateTable,
    scale: float,
) -> Selection:
    """Compact one layer of a sequence that has attended its last known token; last_query: [Hq, D] of that token."""
    sequence, record = row.sequence, row.sequence.record
    keys, values = cache.read(row.blocks, record.prompt_len)
    selection = POLICIES[record.policy].select(
        ScoreInputs(
            keys=keys,
            budget=record.budget,
            window=record.window,
            sinks=record.sinks,
            pool_kernel=record.pool_kernel,
            scale=scale,
            window_queries=sequence.window_queries.pop(layer, None),
            column_sums=sequence.column_sums.pop(layer, None),
        ),
        record.stored,
    )
    if record.calibrated:
        evicted_keys, evicted_values = _take(keys, selection.evicted), _take(values, selection.evicted)
        for part in pool.parts(record.swap_blocks, record.stored):
            part.staging.copy_(_packed(evicted_keys[:, part.tokens], evicted_values[:, part.tokens], len(part.ids)))
            pool.send(layer, part)
        query = last_query.view(keys.shape[0], -1, keys.shape[-1])
        table.put(layer, record.slot, query, attention_state(query, evicted_keys, evicted_values, scale))
    first = record.prompt_len - record.budget
    cache.write(_take(keys, selection.kept), _take(values, selection.kept), row.blocks, first)
    return selection


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """[H, T, D] at per-head positions [H, n] -> [H, n, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _packed(keys: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """Evicted KV [H, m, D] as swap blocks: [num_blocks, H, pages, 2, PAGE_TOKENS, D], zero beyond m."""
    heads, tokens, head_dim = keys.shape
    kv = keys.new_zeros((heads, 2, num_blocks * SWAP_BLOCK_TOKENS, head_dim))
    kv[:, 0, :tokens] = keys
    kv[:, 1, :tokens] = values
    return kv.view(heads, 2, num_blocks, -1, PAGE_TOKENS, head_dim).permute(2, 0, 3, 1, 4, 5)
