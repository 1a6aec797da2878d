"""The worker's side of a sequence's life: its record, by request id, and what its prompt has left behind so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vllm_calidrop.records import SequenceRecord, StepRecords


@dataclass
class Sequence:
    """A sequence that will be, or has been, compacted.

    last_queries: per layer the queries seen so far of the last prompt positions that compaction looks at, [n, Hq, D].
    column_sums: per layer the attention that prompt tokens received, float32 [H, P]; exists only in prefill.
    compaction_seconds: the time that the layers compacted so far have taken.
    """

    record: SequenceRecord
    last_queries: dict[int, Tensor] = field(default_factory=dict)
    column_sums: dict[int, Tensor] = field(default_factory=dict)
    compaction_seconds: float = 0.0


class SequenceTable:
    """All sequences of this worker. compaction_point: int64 [slots], the records' field of that name."""

    def __init__(self, num_slots: int) -> None:
        self._by_id: dict[str, Sequence] = {}
        self.compaction_point = np.zeros(num_slots, dtype=np.int64)

    def apply(self, step: StepRecords) -> list[SequenceRecord]:
        """Release, then admit; returns the admitted records."""
        for request_id in step.released:
            del self._by_id[request_id]
        for record in step.admitted:
            if record.request_id in self._by_id:
                raise RuntimeError(f"calidrop: request {record.request_id} was admitted twice; please report this")
            self._by_id[record.request_id] = Sequence(record)
            self.compaction_point[record.slot] = record.compaction_point
        return step.admitted

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def among(self, request_ids: Iterable[str]) -> list[Sequence]:
        """The sequences of these requests, in their order, without those that are never compacted."""
        found = map(self._by_id.get, request_ids)
        return [one for one in found if one is not None]

    def slots_of(self, request_ids: list[str]) -> np.ndarray:
        """int64 [rows]: each row's state slot, -1 for a sequence that is never compacted."""
        found = map(self._by_id.get, request_ids)
        return np.array([-1 if one is None else one.record.slot for one in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._by_id)
