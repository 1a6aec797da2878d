"""A prompt's compaction on the device: the same order as attention/compaction.py, on the compute stream, never waiting.

Score, copy evicted KV out, calibrate from the same tokens, gather the kept ones, scatter them. All of it is on the
stream before the scheduler frees the blocks, so whatever their next owner writes comes after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies import POLICIES, Needs, ScoreInputs, Selection
from vllm_calidrop.evicted.codecs import Codec, NoCodec, number_of
from vllm_calidrop.evicted.pinned_pool import PinnedSwapPool
from vllm_calidrop.evicted.pool import BLOCKS_AT_ONCE
from vllm_calidrop.ops.triton import (
    KVCache,
    add_column_sums,
    calibrate,
    copy_evicted,
    gather_kept,
    scatter_kept,
    score_scratch_elements,
)
from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
from vllm_calidrop.worker.prefill import PrefillRow, observe_window


class Run(NamedTuple):
    """Evicted tokens of a sequence in the swap pool."""

    swap_blocks: tuple[int, ...]
    stored: int
    codec: Codec


def observe_chunk(row: PrefillRow, layer: int, queries: Tensor, cache: KVCache, scale: float) -> None:
    """Remember what the policy will need of this chunk's queries [length, Hq, D]. Only prompt queries count."""
    record = row.sequence.record
    needs = POLICIES[record.policy].needs
    prompt_end = min(row.done + row.length, record.prompt_len)
    if Needs.COLUMN_SUMS in needs and row.done < prompt_end:
        sums = row.sequence.column_sums.get(layer)
        if sums is None:
            sums = _no_sums(cache, record.prompt_len)
            row.sequence.column_sums[layer] = sums
        _add_sums(sums, queries[: prompt_end - row.done], row.blocks, cache, row.done, scale)
    if needs & Needs.WINDOW:
        observe_window(row, layer, queries, prompt_end)


def compact(
    row: PrefillRow, layer: int, last_query: Tensor, cache: KVCache, worker: CaliDropCudaWorker, scale: float
) -> Selection:
    """Compact one layer of a sequence that has attended its last known token; last_query: [Hq, D] of that token."""
    selection = _select(row, layer, cache, scale)
    record, blocks = row.sequence.record, row.blocks
    if record.calibrated:
        run = Run(record.swap_blocks, record.stored, worker.pool.codecs[number_of(record.codec)])
        refused = offload(layer, blocks, selection.evicted, cache, worker.pool, run)
        state, scratch = worker.state(layer), worker.scratch(1)
        calibrate(last_query, cache, blocks, selection.evicted, state, record.slot, scratch, scale)
        if refused is not None:
            worker.table.refuse(layer, record.slot, refused)
    kept = cache.key.new_empty((2, cache.key.shape[1], record.budget, cache.key.shape[3]))
    gather_kept(cache, blocks, selection.kept, kept)
    scatter_kept(cache, blocks, record.prompt_len - record.budget, kept)
    return selection


def offload(
    layer: int, blocks: Tensor, evicted: Tensor, cache: KVCache, pool: PinnedSwapPool, run: Run
) -> Tensor | None:
    """Send the KV of tokens `evicted` [H, m] on its way to the run's swap blocks.

    Returns bool [H], the KV heads that the codec refuses; None without a codec.
    """
    codec, refused = run.codec, None
    for part in pool.parts(run.swap_blocks, run.stored, codec.tokens_per_block):
        positions = evicted[:, part.tokens].contiguous()
        if isinstance(codec, NoCodec):
            copy_evicted(cache, blocks, positions, part.staging, part.ids)
        else:
            found = _encode(codec, cache, blocks, positions, part.staging)
            refused = found if refused is None else refused | found
        pool.send(layer, part)
    return refused


def _encode(codec: Codec, cache: KVCache, blocks: Tensor, positions: Tensor, staging: Tensor) -> Tensor:
    """Tokens `positions` [H, m], encoded, into the staged blocks: some blocks at a time, so that copies stay small."""
    refused = []
    staged = staging.flatten(2).view(torch.uint8)  # [blocks, H, block_bytes]
    runs = zip(staged.split(BLOCKS_AT_ONCE), positions.split(BLOCKS_AT_ONCE * codec.tokens_per_block, 1), strict=True)
    for some_blocks, some in runs:
        kv = cache.key.new_empty((2, *some.shape, cache.key.shape[3]))
        gather_kept(cache, blocks, some.contiguous(), kv)
        encoded = codec.encode(kv[0], kv[1])
        some_blocks.copy_(encoded.blocks.transpose(0, 1))
        refused.append(encoded.refused)
    return torch.stack(refused).any(0)


def _select(row: PrefillRow, layer: int, cache: KVCache, scale: float) -> Selection:
    sequence, record = row.sequence, row.sequence.record
    needs = POLICIES[record.policy].needs
    window_queries, window_sums = sequence.window_queries.pop(layer, None), None
    if window_queries is not None and Needs.WINDOW_SUMS in needs:
        window_sums = _no_sums(cache, record.prompt_len)
        _add_sums(window_sums, window_queries, row.blocks, cache, record.prompt_len - record.window, scale)
    inputs = ScoreInputs(
        prompt_len=record.prompt_len,
        num_kv_heads=cache.key.shape[1],
        budget=record.budget,
        window=record.window,
        sinks=record.sinks,
        pool_kernel=record.pool_kernel,
        scale=scale,
        device=cache.key.device,
        keys=_prompt_keys(row, cache) if Needs.KEYS in needs else None,
        window_queries=window_queries if Needs.WINDOW_QUERIES in needs else None,
        window_sums=window_sums,
        column_sums=sequence.column_sums.pop(layer, None),
    )
    return POLICIES[record.policy].select(inputs, record.stored)


def _prompt_keys(row: PrefillRow, cache: KVCache) -> Tensor:
    """K [H, P, D] of the prompt, as attended (a copy)."""
    tokens = row.sequence.record.prompt_len
    blocks = row.blocks[: -(-tokens // cache.key.shape[2])].long()
    return cache.key[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]


def _no_sums(cache: KVCache, prompt_len: int) -> Tensor:
    return torch.zeros((cache.key.shape[1], prompt_len), dtype=torch.float32, device=cache.key.device)


def _add_sums(sums: Tensor, queries: Tensor, blocks: Tensor, cache: KVCache, first: int, scale: float) -> None:
    kv_heads = cache.key.shape[1]
    elements = score_scratch_elements(len(queries), kv_heads, queries.shape[1] // kv_heads)
    scratch = torch.empty(elements, dtype=torch.float32, device=queries.device)
    add_column_sums(sums, queries, cache, blocks, first, scale, scratch)
