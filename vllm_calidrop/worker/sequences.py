"""The worker's side of a sequence's life: its record, by request id and, for decode, as arrays by state slot."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.evicted.recall.store import RecallRows
from vllm_calidrop.records import RecallRecord, SequenceRecord, StepRecords
from vllm_calidrop.settings.request import MAX_BUFFER

UNLIMITED = 2**62


@dataclass
class Sequence:
    """A sequence that will be, or has been, compacted.

    window_queries: per layer the queries seen so far of the last `window` prompt positions, [window, Hq, D].
    column_sums: per layer H2O's sums, float32 [H, P]; exists only in prefill.
    compaction_seconds: time that the layers compacted so far have taken.
    """

    record: SequenceRecord
    window_queries: dict[int, Tensor] = field(default_factory=dict)
    column_sums: dict[int, Tensor] = field(default_factory=dict)
    compaction_seconds: float = 0.0


class SequenceTable:
    """All sequences of this worker. Arrays are indexed by state slot and hold the record's fields of the same name.

    codec: its number; most_reads: UNLIMITED for None. recalls: whether the record has a recall; recall_*, buffer_* and
    sketch_table are its fields, top_p NaN for None.
    """

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self._by_id: dict[str, Sequence] = {}
        self.compaction_point = np.zeros(num_slots, dtype=np.int64)
        self.first_block = np.zeros(num_slots, dtype=np.int64)
        self.view_start = np.zeros(num_slots, dtype=np.int64)
        self.stored = np.zeros(num_slots, dtype=np.int64)
        self.theta1 = torch.zeros(num_slots, dtype=torch.float32)
        self.theta2 = torch.zeros(num_slots, dtype=torch.float32)
        self.gate = torch.zeros(num_slots, dtype=torch.int64)
        self.codec = np.zeros(num_slots, dtype=np.int64)
        self.most_reads = np.full(num_slots, UNLIMITED, dtype=np.int64)
        self.swap_table = torch.zeros((num_slots, swap_blocks_for(max_model_len)), dtype=torch.int64)
        self.recalls = np.zeros(num_slots, dtype=np.bool_)
        self.recall_theta = torch.zeros(num_slots, dtype=torch.float32)
        self.recall_eps = torch.zeros(num_slots, dtype=torch.float32)
        self.recall_top_p = torch.zeros(num_slots, dtype=torch.float32)
        self.recall_most = torch.zeros(num_slots, dtype=torch.int64)
        self.buffer_size = torch.zeros(num_slots, dtype=torch.int64)
        self.buffer_table = torch.zeros((num_slots, MAX_BUFFER), dtype=torch.int64)
        self.sketch_table = torch.zeros_like(self.swap_table)

    def apply(self, step: StepRecords) -> list[SequenceRecord]:
        """Release, then admit; returns the admitted records."""
        for request_id in step.released:
            del self._by_id[request_id]
        for record in step.admitted:
            self._admit(record)
        return step.admitted

    def _admit(self, record: SequenceRecord) -> None:
        assert record.request_id not in self._by_id, record.request_id
        self._by_id[record.request_id] = Sequence(record)
        slot = record.slot
        self.compaction_point[slot] = record.compaction_point
        self.first_block[slot] = record.first_block
        self.view_start[slot] = record.view_start
        self.stored[slot] = record.stored
        self.theta1[slot] = record.theta1
        self.theta2[slot] = record.theta2
        self.gate[slot] = record.gate
        self.codec[slot] = number_of(record.codec)
        self.most_reads[slot] = UNLIMITED if record.most_reads is None else record.most_reads
        self.swap_table[slot, : len(record.swap_blocks)] = torch.tensor(record.swap_blocks, dtype=torch.int64)
        self.recalls[slot] = record.recall is not None
        if record.recall is not None:
            self._admit_recall(slot, record.recall)

    def _admit_recall(self, slot: int, recall: RecallRecord) -> None:
        self.recall_theta[slot] = recall.theta
        self.recall_eps[slot] = recall.eps
        self.recall_top_p[slot] = math.nan if recall.top_p is None else recall.top_p
        self.recall_most[slot] = recall.most
        self.buffer_size[slot] = len(recall.buffer_ids)
        self.buffer_table[slot, : len(recall.buffer_ids)] = torch.tensor(recall.buffer_ids, dtype=torch.int64)
        self.sketch_table[slot, : len(recall.sketch_blocks)] = torch.tensor(recall.sketch_blocks)

    def recall_rows(self, rows: Tensor, slots: Tensor) -> RecallRows:
        """What a decode step must know of the rows int64 [M] with these state slots int64 [M]."""
        size = self.buffer_size[slots]
        return RecallRows(
            rows=rows,
            slots=slots,
            theta=self.recall_theta[slots],
            eps=self.recall_eps[slots],
            top_p=self.recall_top_p[slots],
            most=self.recall_most[slots],
            buffer_size=size,
            stored=torch.from_numpy(self.stored[slots.numpy()]),
            swap_blocks=self.swap_table[slots],
            sketch_blocks=self.sketch_table[slots],
            buffer_ids=self.buffer_table[slots, : int(size.max())],
            codec=self.codecs_of(slots.numpy()),
            most_reads=self.most_reads_of(slots.numpy()),
        )

    def codecs_of(self, slots: np.ndarray) -> Tensor | None:
        """Codec numbers int64 [N] of these slots; None if all are `none`."""
        codec = self.codec[slots]
        return torch.from_numpy(codec) if codec.any() else None

    def most_reads_of(self, slots: np.ndarray) -> Tensor | None:
        """int64 [N]; None if nobody has a read budget."""
        most = self.most_reads[slots]
        return torch.from_numpy(most) if (most < UNLIMITED).any() else None

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def slots_of(self, request_ids: list[str]) -> np.ndarray:
        """int64 [rows]: each row's state slot, -1 for a sequence that is never compacted."""
        by_id = self._by_id
        return np.array([by_id[i].record.slot if i in by_id else -1 for i in request_ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._by_id)
