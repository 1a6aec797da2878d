"""What one worker measures, cumulative since it started: two histograms of vllm_calidrop/metrics.py.

The CPU back end counts similarities where it computes them (its operators, in the state table) and times compactions.
They leave with the step's counters; with several ranks the engine sees the first one's.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_calidrop.metrics import COMPACTION_SECONDS, SIMILARITY

SUM_UNIT = 1e-6  # of the sum of similarities, which is kept in an integer


@dataclass(frozen=True)
class Histogram:
    """counts: how many per bucket, one more than bounds. total: the sum of what was observed."""

    counts: list[int]
    total: float


@dataclass(frozen=True)
class WorkerMeasures:
    """A copy that travels to the scheduler's process."""

    similarity: Histogram
    compaction_seconds: Histogram


def similarity_histogram() -> Tensor:
    """int64 [buckets + 2]: how many per bound, how many above the last, their sum in SUM_UNIT."""
    return torch.zeros(len(SIMILARITY.buckets) + 2, dtype=torch.int64)


SIMILARITY_BOUNDS = torch.tensor(SIMILARITY.buckets, dtype=torch.float32)


def observe_similarity(histogram: Tensor, rho: Tensor) -> None:
    """Add similarities of any shape; NaN is none (a head without evicted KV), and rounding may exceed 1."""
    rho = rho[~rho.isnan()].clamp(max=1.0)
    places = torch.bucketize(rho, SIMILARITY_BOUNDS)
    histogram[:-1] += torch.bincount(places, minlength=len(histogram) - 1)
    histogram[-1] += (rho.double() / SUM_UNIT).round().long().sum()


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
