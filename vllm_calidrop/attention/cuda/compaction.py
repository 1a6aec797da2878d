"""A prompt's compaction on the device: the same order as attention/compaction.py, on the compute stream, never waiting.

Score, copy evicted KV out, calibrate from the same tokens, gather the kept ones, scatter them. All of it is on the
stream before the scheduler frees the blocks, so whatever their next owner writes comes after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.attention.cuda.worker import CaliDropCudaWorker
from vllm_calidrop.attention.ops.triton import (
    KVCache,
    add_column_sums,
    calibrate,
    copy_evicted,
    gather_kept,
    scatter_kept,
    score_scratch_elements,
)
from vllm_calidrop.attention.prefill import PrefillRow, observe_window
from vllm_calidrop.policies import POLICIES, ScoreInputs, Selection


def observe_chunk(row: PrefillRow, layer: int, queries: Tensor, cache: KVCache, scale: float) -> None:
    """Remember what the policy will need of this chunk's queries [length, Hq, D]. Only prompt queries count."""
    record = row.sequence.record
    policy = POLICIES[record.policy]
    prompt_end = min(row.done + row.length, record.prompt_len)
    if policy.needs_column_sums and row.done < prompt_end:
        sums = row.sequence.column_sums.get(layer)
        if sums is None:
            sums = _no_sums(cache, record.prompt_len)
            row.sequence.column_sums[layer] = sums
        _add_sums(sums, queries[: prompt_end - row.done], row.blocks, cache, row.done, scale)
    if policy.needs_window_queries:
        observe_window(row, layer, queries, prompt_end)


def compact(
    row: PrefillRow, layer: int, last_query: Tensor, cache: KVCache, worker: CaliDropCudaWorker, scale: float
) -> Selection:
    """Compact one layer of a sequence that has attended its last known token; last_query: [Hq, D] of that token."""
    selection = _select(row, layer, cache, scale)
    record, blocks = row.sequence.record, row.blocks
    if record.calibrated:
        for part in worker.pool.parts(record.swap_blocks, record.stored):
            positions = selection.evicted[:, part.tokens].contiguous()
            copy_evicted(cache, blocks, positions, part.staging, part.ids)
            worker.pool.send(layer, part)
        state, scratch = worker.state(layer), worker.scratch(1)
        calibrate(last_query, cache, blocks, selection.evicted, state, record.slot, scratch, scale)
    kept = cache.key.new_empty((2, cache.key.shape[1], record.budget, cache.key.shape[3]))
    gather_kept(cache, blocks, selection.kept, kept)
    scatter_kept(cache, blocks, record.prompt_len - record.budget, kept)
    return selection


def _select(row: PrefillRow, layer: int, cache: KVCache, scale: float) -> Selection:
    sequence, record = row.sequence, row.sequence.record
    window_queries, window_sums = sequence.window_queries.pop(layer, None), None
    if window_queries is not None:
        window_sums = _no_sums(cache, record.prompt_len)
        _add_sums(window_sums, window_queries, row.blocks, cache, record.prompt_len - record.window, scale)
    # The sums hold all that the policies want of the keys; what these are asked for otherwise is their shape.
    keys = cache.key.new_full((), torch.nan).expand(cache.key.shape[1], record.prompt_len, cache.key.shape[3])
    inputs = ScoreInputs(
        keys=keys,
        budget=record.budget,
        window=record.window,
        sinks=record.sinks,
        pool_kernel=record.pool_kernel,
        scale=scale,
        window_queries=window_queries,
        column_sums=sequence.column_sums.pop(layer, None),
        window_sums=window_sums,
    )
    return POLICIES[record.policy].select(inputs, record.stored)


def _no_sums(cache: KVCache, prompt_len: int) -> Tensor:
    return torch.zeros((cache.key.shape[1], prompt_len), dtype=torch.float32, device=cache.key.device)


def _add_sums(sums: Tensor, queries: Tensor, blocks: Tensor, cache: KVCache, first: int, scale: float) -> None:
    kv_heads = cache.key.shape[1]
    elements = score_scratch_elements(len(queries), kv_heads, queries.shape[1] // kv_heads)
    scratch = torch.empty(elements, dtype=torch.float32, device=queries.device)
    add_column_sums(sums, queries, cache, blocks, first, scale, scratch)
