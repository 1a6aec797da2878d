"""All that one worker holds beside vLLM's own: tables, pools and sequences, at fixed addresses, made once the KV cache
exists and before CUDA graphs are captured. The same for every platform; only where the tables lie differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies import Selection
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.ops.base import ModelKV, OperatorSet, Tables
from vllm_calidrop.ops.similarity import similarity_histogram
from vllm_calidrop.records import SequenceCounters, SequenceRecord, StepRecords
from vllm_calidrop.worker.measures import Measures
from vllm_calidrop.worker.sequences import Sequence, SequenceTable
from vllm_calidrop.worker.slots import SlotTables
from vllm_calidrop.worker.state_table import StateTable
from vllm_calidrop.worker.step import StepTable, upload

# Called with (record, layer, selection) when a layer of a sequence has been compacted; tests and diagnostics.
CompactionListener = Callable[[SequenceRecord, int, Selection], None]


class CaliDropWorker:
    """The worker-side state of one engine on one rank.

    layer_names: attention layers in the order of the KV-cache group; a layer's index is its place here. max_rows:
    sequences of a batch at most. device: where the KV cache lies. operators: the set that serves (ops/registry.py).
    """

    def __init__(
        self,
        runner: Any,
        layer_names: list[str],
        shape: ModelShape,
        num_slots: int,
        pools: PoolSizes,
        max_rows: int,
        device: torch.device,
        pool: SwapPool,
        operators: type[OperatorSet],
        model: ModelKV,
    ) -> None:
        self.runner = runner
        self.device = device
        self.pool = pool
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        layers, kv_heads, head_dim, dtype = len(layer_names), shape.num_kv_heads, shape.head_dim, shape.dtype
        self.sequences = SequenceTable(num_slots)
        self.table = StateTable(layers, num_slots, kv_heads, model.group, head_dim, dtype, device)
        self.slots = SlotTables(num_slots, shape.max_model_len, head_dim, dtype, device)
        self.step = StepTable(max_rows, device)
        self.recall = RecallStore(
            layers, num_slots, pools.sketch_blocks, pools.buffer_pages, kv_heads, head_dim, dtype, pools.sketch_rest
        )
        similarity = similarity_histogram()
        self.measures = Measures(similarity)
        tables = Tables(self.slots.sequences, self.slots.recall, self.table.layers, similarity, pool, self.recall)
        self.operators = operators(tables, model, max_rows)
        self.on_compaction: CompactionListener | None = None
        self._scheduled: list[Sequence] = []
        self._unfinished: list[Sequence] = []

    @staticmethod
    def table_bytes(max_model_len: int, num_slots: int, max_rows: int) -> int:
        """Bytes of slot and step tables, beside the state table and what the operators hold."""
        return SlotTables.num_bytes(num_slots, max_model_len) + StepTable.num_bytes(max_rows)

    def begin_step(self, step: StepRecords | None, scheduled_ids: list[str]) -> None:
        """Take over the scheduler's records, before anything of the step runs."""
        if step is not None:
            admitted = self.sequences.apply(step)
            for record in admitted:
                self.table.admit(record.slot)
                self.recall.admit(record)
            self.slots.admit(admitted)
            living = (*self._unfinished, *self.sequences.among([record.request_id for record in admitted]))
            self._unfinished = [one for one in living if self.sequences.get(one.record.request_id) is one]
        self._scheduled = self.sequences.among(scheduled_ids)
        self.pool.join()

    def has_unfinished_prompt(self) -> bool:
        """Whether a prompt that will be compacted is scheduled and was not complete before this step.

        Asked when the runner has taken in the step. Prompts that are complete are not asked about again.
        """
        if not self._unfinished:
            return False
        scheduled = {id(one) for one in self._scheduled}
        self._unfinished = [
            one
            for one in self._unfinished
            if id(one) not in scheduled or self._done(one.record.request_id) < one.record.compaction_point
        ]
        return any(id(one) in scheduled for one in self._unfinished)

    def close(self) -> None:
        """Give back what is not freed with this object."""
        self.pool.close()

    def request_ids(self, common_attn_metadata: Any) -> list[str]:
        """Request of every row. Model runner V2 says so in the metadata, V1 keeps it in its input batch."""
        if common_attn_metadata.req_idx is not None:
            index_to_id = self.runner.req_states.index_to_req_id
            return [index_to_id[index] for index in common_attn_metadata.req_idx.tolist()]
        return list(self.runner.input_batch.req_ids[: common_attn_metadata.num_reqs])

    def layer_compacted(self, sequence: Sequence, layer: int, selection: Selection, seconds: float) -> None:
        """One layer of a sequence was compacted; with the last one the sequence's time is known."""
        sequence.compaction_seconds += seconds
        if layer == len(self.layer_index) - 1:
            self.measures.compacted(sequence.compaction_seconds)
        if self.on_compaction is not None:
            self.on_compaction(sequence.record, layer, selection)

    def step_counts(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Counters of the step's sequences: (request id, admission), and int64 [n, layers, COUNTERS], a copy."""
        records = [sequence.record for sequence in self._scheduled]
        index = torch.empty(len(records), dtype=torch.int64, device=self.device)
        upload(np.array([record.slot for record in records], dtype=np.int64), index)
        owners = [(record.request_id, record.admission) for record in records]
        return owners, self.table.counts.index_select(0, index)

    def _done(self, request_id: str) -> int:
        """Tokens of a request computed before this step: V2 keeps them in its request table, V1 in its batch."""
        if hasattr(self.runner, "req_states"):
            states = self.runner.req_states
            return int(states.num_computed_tokens_np[states.req_id_to_index[request_id]])
        batch = self.runner.input_batch
        return int(batch.num_computed_tokens_cpu[batch.req_id_to_index[request_id]])


def counters_of(owners: list[tuple[str, int]], counts: Tensor) -> dict[str, SequenceCounters]:
    """What travels to the scheduler: the counters of `step_counts`, summed over ranks, by request id."""
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
