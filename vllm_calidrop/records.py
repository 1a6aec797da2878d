"""What the scheduler's process and the workers tell each other: plain dataclasses that pickle.

Workers derive nothing of what they are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# The attribute under which a StepRecords travels on vLLM's SchedulerOutput, and counters and the worker's measures on
# its ModelRunnerOutput.
RECORDS_ATTRIBUTE = "calidrop"
COUNTERS_ATTRIBUTE = "calidrop_counters"
MEASURES_ATTRIBUTE = "calidrop_measures"

# Columns of the counters, per layer: decisions of query heads, reads of KV head groups, 16-token pages read by those.
# pages_read is counted for recall by pages; otherwise it follows from group_reads (cache/reports.py). skipped: KV head
# groups (with recall by pages: pages) that the read budget kept from being read. nonfinite: KV heads whose evicted
# KV the codec refused, because it holds NaN or inf; they go on without calibration.
COUNTERS = ("recomputes", "merges", "plain", "group_reads", "pages_read", "skipped", "nonfinite")


@dataclass(frozen=True)
class RecallRecord:
    """How one sequence recalls pages, and what it holds for that on the device (vllm_calidrop/evicted/recall).

    theta: the look gate. top_p: None for the top-k choice. most: pages of one look. sketch_blocks: as many as swap
    blocks; buffer_ids: one per place of its page buffer, each for every layer and KV head. rest: how values are coded
    that unread tokens are attended with; none: those tokens are ignored.
    """

    theta: float
    eps: float
    top_p: float | None
    most: int
    sketch_blocks: tuple[int, ...]
    buffer_ids: tuple[int, ...]
    rest: str = "none"


@dataclass(frozen=True)
class SequenceRecord:
    """One sequence whose prompt will be compacted. Final until the sequence ends or is preempted.

    prompt_len: P. compaction_point: tokens known at (re-)admission; a layer is compacted when it has attended that
    many. first_block: g. stored: evicted tokens per KV head that go to the swap pool (0: no calibration). recall: None
    unless its evicted KV is recalled by pages. codec: how it lies in the swap blocks. most_reads: KV head groups (with
    recall: pages) that each layer may read in a step on one rank; None: no read budget.
    admission: increases with every admission of any sequence; tells counters of different lives apart.
    """

    request_id: str
    admission: int
    slot: int
    prompt_len: int
    compaction_point: int
    budget: int
    first_block: int
    view_start: int
    policy: str
    window: int
    sinks: int
    pool_kernel: int
    theta1: float
    theta2: float
    gate: int
    stored: int
    swap_blocks: tuple[int, ...]
    recall: RecallRecord | None = None
    codec: str = "none"
    most_reads: int | None = None

    @property
    def calibrated(self) -> bool:
        return self.stored > 0


@dataclass
class StepRecords:
    """What changed since the last step. Workers release first, then admit: a slot may be handed on within one step."""

    released: list[str] = field(default_factory=list)
    admitted: list[SequenceRecord] = field(default_factory=list)


class SequenceCounters(NamedTuple):
    """Counters of one sequence since its admission, summed over ranks. counts: int64 [layers, COUNTERS].

    sums: those over the layers.
    """

    admission: int
    counts: np.ndarray
    sums: list[int]

    @classmethod
    def of(cls, admission: int, counts: np.ndarray) -> SequenceCounters:
        return cls(admission, counts, counts.sum(0).tolist())


@dataclass(frozen=True)
class Histogram:
    """counts: how many per bucket, one more than bounds. total: the sum of what was observed."""

    counts: list[int]
    total: float


@dataclass(frozen=True)
class WorkerMeasures:
    """What one worker has measured since it started (vllm_calidrop/metrics.py)."""

    similarity: Histogram
    compaction_seconds: Histogram


def records_of(scheduler_output: Any) -> StepRecords | None:
    return getattr(scheduler_output, RECORDS_ATTRIBUTE, None)
