"""What happens to a prompt that will be compacted, chunk by chunk, and then once when a layer has seen all of it.

The order within a layer: score, copy evicted KV out, calibrate from the same tokens (or sketch their keys, for recall
by pages), gather the kept tokens, scatter them. Blocks below g are only read, so they may be shared with other
sequences. On a GPU all of it is put on the compute stream without waiting, before the scheduler frees the blocks; so
whatever their next owner writes comes after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies import POLICIES, Needs, ScoreInputs, Selection
from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.recall.balance import balance_queries
from vllm_calidrop.ops.base import OperatorSet
from vllm_calidrop.ops.state import refuse_heads
from vllm_calidrop.records import SequenceRecord
from vllm_calidrop.worker.prefill import PrefillRow, observe_last_queries
from vllm_calidrop.worker.worker import CaliDropWorker


def observe_chunk(
    row: PrefillRow, layer: int, queries: Tensor, cache: Any, operators: OperatorSet, scale: float
) -> None:
    """Remember what the policy will need of this chunk's queries [length, Hq, D]. Only prompt queries count."""
    record = row.sequence.record
    needs = POLICIES[record.policy].needs
    prompt_end = min(row.done + row.length, record.prompt_len)
    if Needs.COLUMN_SUMS in needs and row.done < prompt_end:
        sums = row.sequence.column_sums.get(layer)
        if sums is None:
            sums = row.sequence.column_sums[layer] = _no_sums(record, queries, operators)
        operators.observe(sums, queries[: prompt_end - row.done], cache, row.blocks, row.done, scale)
    observe_last_queries(row, layer, queries, prompt_end)


def compact(
    row: PrefillRow, layer: int, last_query: Tensor, cache: Any, worker: CaliDropWorker, scale: float
) -> Selection:
    """Compact one layer of a sequence that has attended its last known token; last_query: [Hq, D] of that token."""
    record, blocks, operators = row.sequence.record, row.blocks, worker.operators
    last_queries = row.sequence.last_queries.pop(layer, None)
    selection = _select(row, layer, last_query, last_queries, cache, operators, scale)
    if record.calibrated:
        refused = _offload(layer, blocks, selection.evicted, cache, worker, record)
        if record.recall is not None:
            _sketch(layer, row, selection.evicted, last_queries, cache, worker)
            worker.recall.refuse(layer, record.slot, refused)
        else:
            operators.calibrate(last_query, cache, blocks, selection.evicted, layer, record.slot, scale)
        refuse_heads(worker.table.layers[layer], record.slot, refused)
    kept = operators.take(cache, blocks, selection.kept)
    operators.put(cache, blocks, record.prompt_len - record.budget, *kept)
    return selection


def _sketch(
    layer: int, row: PrefillRow, evicted: Tensor, last_queries: Tensor | None, cache: Any, worker: CaliDropWorker
) -> None:
    """Sketch the keys of tokens `evicted` [H, m], and code their values where unread tokens are attended too."""
    record, operators = row.sequence.record, worker.operators
    assert record.recall is not None
    keys, values = operators.take(cache, row.blocks, evicted)
    prompt_keys, prompt_values = _prompt_kv(record, cache, row.blocks, operators)
    if record.recall.rest == "none":
        worker.recall.put_sketch(layer, record, keys, prompt_keys)
    else:
        assert last_queries is not None
        queries = last_queries[-balance_queries(record.recall.rest, record.prompt_len) :]
        worker.recall.put_sketch(layer, record, keys, prompt_keys, queries)
        worker.recall.put_values(layer, record, values, prompt_values)


def _select(
    row: PrefillRow, layer: int, like: Tensor, last_queries: Tensor | None, cache: Any, operators: OperatorSet,
    scale: float,
) -> Selection:  # fmt: skip
    """The policy's choice, from exactly what it declares that it needs."""
    sequence, record = row.sequence, row.sequence.record
    policy = POLICIES[record.policy]
    window_queries = (
        last_queries[-record.window :] if policy.needs & Needs.WINDOW and last_queries is not None else None
    )
    window_sums = None
    if Needs.WINDOW_SUMS in policy.needs and window_queries is not None:
        window_sums = _no_sums(record, like, operators)
        before = record.prompt_len - record.window
        operators.observe(window_sums, window_queries, cache, row.blocks, before, scale)
    inputs = ScoreInputs(
        prompt_len=record.prompt_len,
        num_kv_heads=operators.model.num_kv_heads,
        budget=record.budget,
        window=record.window,
        sinks=record.sinks,
        pool_kernel=record.pool_kernel,
        scale=scale,
        device=like.device,
        keys=_prompt_kv(record, cache, row.blocks, operators)[0] if Needs.KEYS in policy.needs else None,
        window_queries=window_queries if Needs.WINDOW_QUERIES in policy.needs else None,
        window_sums=window_sums,
        column_sums=sequence.column_sums.pop(layer, None),
    )
    return policy.select(inputs, record.stored)


def _offload(
    layer: int, blocks: Tensor, evicted: Tensor, cache: Any, worker: CaliDropWorker, record: SequenceRecord
) -> Tensor:
    """Send the KV of tokens `evicted` [H, m] on its way to the swap pool. Returns bool [H], the KV heads refused."""
    codec, refused = worker.pool.codecs[number_of(record.codec)], []
    for part in worker.pool.parts(record.swap_blocks, record.stored, codec):
        positions = evicted[:, part.tokens].contiguous()
        refused.append(worker.operators.pack(cache, blocks, positions, codec, part.out))
        worker.pool.send(layer, part)
    return torch.stack(refused).any(0)


def _prompt_kv(record: SequenceRecord, cache: Any, blocks: Tensor, operators: OperatorSet) -> tuple[Tensor, Tensor]:
    """K and V [H, P, D] of the prompt, as attended (a copy)."""
    every = torch.arange(record.prompt_len, device=blocks.device).expand(operators.model.num_kv_heads, -1)
    return operators.take(cache, blocks, every.contiguous())


def _no_sums(record: SequenceRecord, like: Tensor, operators: OperatorSet) -> Tensor:
    shape = (operators.model.num_kv_heads, record.prompt_len)
    return torch.zeros(shape, dtype=torch.float32, device=like.device)
