"""What one engine has done since it started: the cumulative numbers behind its metrics. Kept by the ledger."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_calidrop.metrics import COMPACTION_SECONDS, SIMILARITY
from vllm_calidrop.records import COUNTERS, SequenceRecord, WorkerMeasures
from vllm_calidrop.scheduler.reports import Report
from vllm_calidrop.scheduler.shape import Shape

MODES = ("calidrop", "evict", "full")
FALLBACK_REASONS = ("swap_full", "recall_full")


class Totals:
    """Requests count once, at their first admission or compaction; a preemption adds to the work that was done.

    layers: int64 [layers, COUNTERS] of requests that have ended; those that live are added when somebody asks.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.by_mode = dict.fromkeys(MODES, 0)
        self.fallbacks = dict.fromkeys(FALLBACK_REASONS, 0)
        self.swap_waits = 0
        self.kept_tokens = 0
        self.evicted_tokens = 0
        self.kv_blocks_freed = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self._measures: WorkerMeasures | None = None
        self.layers = np.zeros((shape.num_layers, len(COUNTERS)), dtype=np.int64)

    def admitted(self, report: Report) -> None:
        """An admission stands."""
        if report.reason in FALLBACK_REASONS:
            self.fallbacks[report.reason] += 1
        if not report.counted:
            report.counted = True
            self.by_mode[report.mode] += 1

    def compacted(self, record: SequenceRecord, report: Report) -> None:
        """The step that compacted a prompt has been processed."""
        shape = self._shape
        heads = shape.num_kv_heads * shape.num_layers * shape.ranks
        self.bytes_out += heads * shape.codec(record.codec).run_bytes(record.stored)
        if not report.compacted:
            report.compacted = True
            self.kept_tokens += report.kept
            self.evicted_tokens += report.evicted

    def ended(self, report: Report) -> None:
        """A request is no longer known to vLLM."""
        self.bytes_in += report.bytes_read
        counts = report.counts
        if counts is not None:
            self.layers += counts

    def as_dict(self, living: list[Report]) -> dict[str, Any]:
        """The totals with the work of the requests that live now; `layers` apart, as it is shown apart."""
        return {
            "kept_tokens": self.kept_tokens,
            "evicted_tokens": self.evicted_tokens,
            "bytes_out": self.bytes_out,
            "bytes_in": self.bytes_in + sum(report.bytes_read for report in living),
            "requests_by_mode": dict(self.by_mode),
            "fallbacks_by_reason": dict(self.fallbacks),
            "swap_waits": self.swap_waits,
        }

    def measured(self, measures: WorkerMeasures | None) -> None:
        """What a step's output brought of the worker's measures, which are cumulative."""
        if measures is not None:
            self._measures = measures

    def histograms(self) -> dict[str, tuple[list[int], float]]:
        """Each metric's counts per bucket (one more than there are bounds), and the sum of what was observed."""
        by_metric = {
            COMPACTION_SECONDS: self._measures.compaction_seconds if self._measures else None,
            SIMILARITY: self._measures.similarity if self._measures else None,
        }
        return {
            metric.name: (found.counts, found.total) if found else ([0] * (len(metric.buckets) + 1), 0.0)
            for metric, found in by_metric.items()
        }

    def layers_with(self, living: list[Report]) -> dict[str, list[int]]:
        """Per counter a list over layers."""
        counts = self.layers.copy()
        for report in living:
            if (own := report.counts) is not None:
                counts += own
        return dict(zip(COUNTERS, counts.T.tolist(), strict=True))
