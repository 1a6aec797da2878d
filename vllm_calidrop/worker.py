"""All that one worker holds beside vLLM's own: sequences, state table, pools. Made once the KV cache exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.cache.swap import SwapPool
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.policies import Selection
from vllm_calidrop.recall.store import RecallStore
from vllm_calidrop.records import SequenceCounters, SequenceRecord, StepRecords
from vllm_calidrop.sequences import SequenceTable
from vllm_calidrop.state_table import StateTable

# Called with (record, layer, selection) when a layer of a sequence has been compacted; tests and diagnostics.
CompactionListener = Callable[[SequenceRecord, int, Selection], None]


class CaliDropWorker:
    """The worker-side state of one engine on one rank.

    layer_names: attention layers in the order of the KV-cache group; a layer's index is its place here.
    """

    def __init__(
        self, runner: Any, layer_names: list[str], shape: ModelShape, num_slots: int, pools: PoolSizes
    ) -> None:
        self.runner = runner
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        layers, kv_heads, head_dim = len(layer_names), shape.num_kv_heads, shape.head_dim
        group = shape.num_query_heads // kv_heads
        self.sequences = SequenceTable(num_slots, shape.max_model_len)
        self.table = StateTable(layers, num_slots, kv_heads, group, head_dim, shape.dtype, self.device)
        self.pool = self._make_pool(layers, pools.swap_blocks, kv_heads, head_dim, shape.dtype)
        self.recall = RecallStore(
            layers, num_slots, pools.sketch_blocks, pools.buffer_pages, kv_heads, head_dim, shape.dtype
        )
        self.on_compaction: CompactionListener | None = None
        self._step_ids: list[str] = []

    @property
    def device(self) -> torch.device:
        """Where the state table lies: beside the KV cache."""
        return torch.device("cpu")

    def _make_pool(self, *shape: Any) -> SwapPool:
        return SwapPool(*shape)

    def begin_step(self, step: StepRecords | None, scheduled_ids: list[str]) -> None:
        """Take over the scheduler's records, before anything of the step runs."""
        if step is not None:
            for record in self.sequences.apply(step):
                self.table.admit(record.slot)
                self.recall.admit(record)
        self._step_ids = [request_id for request_id in scheduled_ids if self.sequences.get(request_id) is not None]

    def request_ids(self, common_attn_metadata: Any) -> list[str]:
        """Request of every row. Model runner V2 says so in the metadata, V1 keeps it in its input batch."""
        if common_attn_metadata.req_idx is not None:
            index_to_id = self.runner.req_states.index_to_req_id
            return [index_to_id[index] for index in common_attn_metadata.req_idx.tolist()]
        return list(self.runner.input_batch.req_ids[: common_attn_metadata.num_reqs])

    def step_counts(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Counters of the step's sequences: (request id, admission), and int64 [n, layers, COUNTERS], a copy."""
        records = [sequence.record for i in self._step_ids if (sequence := self.sequences.get(i)) is not None]
        counts = self.table.counts[[record.slot for record in records]]
        return [(record.request_id, record.admission) for record in records], counts


def counters_of(owners: list[tuple[str, int]], counts: Tensor) -> dict[str, SequenceCounters]:
    of_all = counts.numpy()
    return {
        request_id: SequenceCounters(admission, rows, sums)
        for (request_id, admission), rows, sums in zip(owners, of_all, of_all.sum(1).tolist(), strict=True)
    }


_active: CaliDropWorker | None = None


def active_worker() -> CaliDropWorker | None:
    """The worker whose step is running in this process; None outside a step (profiling, warm-up, dummy batches)."""
    return _active


@contextmanager
def step_of(worker: CaliDropWorker) -> Iterator[None]:
    """Makes `worker` the active one while its model runs."""
    global _active
    previous, _active = _active, worker
    try:
        yield
    finally:
        _active = previous
