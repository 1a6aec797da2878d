"""All that one worker holds beside vLLM's own: sequences, state table, pools. Made once the KV cache exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies import Selection
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.records import SequenceCounters, SequenceRecord, StepRecords
from vllm_calidrop.worker.measures import Measures
from vllm_calidrop.worker.sequences import Sequence, SequenceTable
from vllm_calidrop.worker.state_table import StateTable

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
        self.measures = Measures(self.table.similarity)
        self.on_compaction: CompactionListener | None = None
        self._step_ids: list[str] = []

    @property
    def device(self) -> torch.device:
        """Where the state table lies: beside the KV cache."""
        return torch.device("cpu")

    def _make_pool(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> SwapPool:
        return SwapPool(num_layers, num_blocks, num_kv_heads, head_dim, dtype)

    def begin_step(self, step: StepRecords | None, scheduled_ids: list[str]) -> None:
        """Take over the scheduler's records, before anything of the step runs."""
        if step is not None:
            for record in self.sequences.apply(step):
                self.table.admit(record.slot)
                self.recall.admit(record)
        self._step_ids = [request_id for request_id in scheduled_ids if self.sequences.get(request_id) is not None]

    def has_unfinished_prompt(self) -> bool:
        """Whether a prompt that will be compacted is scheduled and was not complete before this step."""
        return any(self._done(i) < sequence.record.compaction_point for i, sequence in self._step_sequences())

    def close(self) -> None:
        """Give back what is not freed with this object."""

    def request_ids(self, common_attn_metadata: Any) -> list[str]:
        """Request of every row. Model runner V2 says so in the metadata, V1 keeps it in its input batch."""
        if common_attn_metadata.req_idx is not None:
            index_to_id = self.runner.req_states.index_to_req_id
            return [index_to_id[index] for index in common_attn_metadata.req_idx.tolist()]
        return list(self.runner.input_batch.req_ids[: common_attn_metadata.num_reqs])

    def layer_compacted(self, sequence: Sequence, layer: int, seconds: float) -> None:
        """One layer of a sequence was compacted; with the last one the sequence's time is known."""
        sequence.compaction_seconds += seconds
        if layer == len(self.layer_index) - 1:
            self.measures.compacted(sequence.compaction_seconds)

    def step_counts(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Counters of the step's sequences: (request id, admission), and int64 [n, layers, COUNTERS], a copy."""
        records = [sequence.record for _, sequence in self._step_sequences()]
        counts = self._counts_of([record.slot for record in records])
        return [(record.request_id, record.admission) for record in records], counts

    def _counts_of(self, slots: list[int]) -> Tensor:
        return self.table.counts[slots]

    def _step_sequences(self) -> Iterator[tuple[str, Sequence]]:
        for request_id in self._step_ids:
            sequence = self.sequences.get(request_id)
            if sequence is not None:
                yield request_id, sequence

    def _done(self, request_id: str) -> int:
        """Tokens of a request computed before this step: V2 keeps them in its request table, V1 in its batch."""
        if hasattr(self.runner, "req_states"):
            states = self.runner.req_states
            return int(states.num_computed_tokens_np[states.req_id_to_index[request_id]])
        batch = self.runner.input_batch
        return int(batch.num_computed_tokens_cpu[batch.req_id_to_index[request_id]])


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
