"""What one worker measures, cumulative since it started: two histograms of vllm_calidrop/metrics.py.

The CPU back end counts similarities where it computes them (its operators, in the state table) and times compactions.
They leave with the step's counters; with several ranks the engine sees the first one's.
"""

from __future__ import annotations

from bisect import bisect_left

from torch import Tensor

from vllm_calidrop.metrics import COMPACTION_SECONDS
from vllm_calidrop.ops.similarity import SUM_UNIT
from vllm_calidrop.records import Histogram, WorkerMeasures


class Measures:
    """similarity: the state table's histogram, which the operators add to."""

    def __init__(self, similarity: Tensor) -> None:
        self._similarity = similarity
        self._compactions = [0] * (len(COMPACTION_SECONDS.buckets) + 1)
        self._seconds = 0.0

    def compacted(self, seconds: float) -> None:
        """A prompt was compacted, in so much time over all layers."""
        self._compactions[bisect_left(COMPACTION_SECONDS.buckets, seconds)] += 1
        self._seconds += seconds

    def snapshot(self) -> WorkerMeasures:
        *counts, total = self._similarity.tolist()
        return WorkerMeasures(Histogram(counts, total * SUM_UNIT), Histogram(list(self._compactions), self._seconds))
