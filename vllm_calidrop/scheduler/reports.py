"""What an engine says of its requests: a report per request, from its admission until vLLM forgets it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_calidrop.evicted.layout import pages_for
from vllm_calidrop.records import COUNTERS, SequenceCounters
from vllm_calidrop.scheduler.admission import Decision

if TYPE_CHECKING:
    from vllm_calidrop.scheduler.totals import Totals

_GROUP_READS, _PAGES_READ = COUNTERS.index("group_reads"), COUNTERS.index("pages_read")

# Steps after which the API process is told again of an answer whose end the engine will see.
NEWS_EVERY = 16


@dataclass
class Report:
    """What the answer's `calidrop` object says; counters accumulate over preemptions.

    read_bytes: of one read: a KV head group's stored tokens, or a page where they are recalled by pages.
    counted, compacted: whether the request is in the engine's totals already. often: tell every
    change of it, as its end may be seen in the API process alone. changes: since the API process was told.
    """

    prompt_tokens: int
    kept: int
    evicted: int
    mode: str
    reason: str | None
    stored: int
    codec: str | None = None
    read_bytes: int = 0
    by_pages: bool = False
    earlier_bytes: int = 0
    earlier: np.ndarray | None = None
    current: SequenceCounters | None = None
    counted: bool = False
    compacted: bool = False
    often: bool = True
    changes: int = NEWS_EVERY

    @classmethod
    def of(cls, decision: Decision) -> Report:
        return cls(
            prompt_tokens=decision.prompt_len,
            kept=decision.kept,
            evicted=decision.evicted,
            mode=decision.mode if decision.is_admission else "refused",
            reason=decision.reason,
            stored=decision.stored,
            codec=decision.codec,
            read_bytes=decision.read_bytes,
            by_pages=decision.by_pages,
        )

    @property
    def counts(self) -> np.ndarray | None:
        """int64 [layers, COUNTERS] over all lives of the request; None if it was never compacted."""
        if self.current is None:
            return self.earlier
        counts = self.current.counts
        if not self.by_pages:
            counts = counts.copy()
            counts[:, _PAGES_READ] = counts[:, _GROUP_READS] * pages_for(self.stored)
        return counts if self.earlier is None else counts + self.earlier

    @property
    def bytes_read(self) -> int:
        """Encoded bytes, with all that is needed to decode them."""
        if self.current is None:
            return self.earlier_bytes
        reads = self.current.sums[_PAGES_READ if self.by_pages else _GROUP_READS]
        return self.earlier_bytes + reads * self.read_bytes

    @property
    def sums(self) -> list[int]:
        """`counts` over all layers; zeros if it was never compacted."""
        if self.current is None or self.earlier is not None:
            counts = self.counts
            return counts.sum(0).tolist() if counts is not None else [0] * len(COUNTERS)
        sums = list(self.current.sums)
        if not self.by_pages:
            sums[_PAGES_READ] = sums[_GROUP_READS] * pages_for(self.stored)
        return sums

    def as_dict(self, with_layers: bool) -> dict[str, Any]:
        report: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "kept": self.kept,
            "evicted": self.evicted,
            "mode": self.mode,
            "reason": self.reason,
            "codec": self.codec,
        }
        report.update(zip(COUNTERS, self.sums, strict=True))
        report["bytes_read"] = self.bytes_read
        if with_layers and (counts := self.counts) is not None:
            report["layers"] = dict(zip(COUNTERS, counts.T.tolist(), strict=True))
        return report


class Reports:
    """Those of the requests that vLLM still knows, waiting ones included that were preempted."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._reports: dict[str, Report] = {}

    def __getitem__(self, request_id: str) -> Report:
        return self._reports[request_id]

    def open(self, request_id: str, decision: Decision, often: bool = True) -> None:
        """A request is admitted, perhaps again: what was counted before a preemption stays."""
        report, earlier = Report.of(decision), self._reports.get(request_id)
        report.often = often
        if earlier is not None:
            report.earlier, report.earlier_bytes = earlier.counts, earlier.bytes_read
            report.counted, report.compacted = earlier.counted, earlier.compacted
        self._reports[request_id] = report

    def count(self, request_id: str, counted: SequenceCounters) -> None:
        report = self._reports[request_id]
        report.current = counted
        report.changes += 1

    def said(self, request_id: str, finished: bool) -> dict[str, Any] | None:
        """The report so far; with the counters of every layer once the request is finished."""
        report = self._reports.get(request_id)
        return report.as_dict(with_layers=finished) if report else None

    def news(self, request_id: str, finished: bool) -> dict[str, Any] | None:
        """The same, unless the API process has it nearly as it is. It gets the last one of a request in any case, and
        every change where only it sees the end of the answer (a stop string); of an aborted request it may lack the
        last NEWS_EVERY steps."""
        report = self._reports.get(request_id)
        if report is None or (not finished and report.changes < (1 if report.often else NEWS_EVERY)):
            return None
        report.changes = 0
        return self.said(request_id, finished)

    def all(self) -> list[Report]:
        return list(self._reports.values())

    def forget(self, alive: Container[str]) -> None:
        """Drop reports of requests that vLLM no longer knows."""
        for request_id in [request_id for request_id in self._reports if request_id not in alive]:
            self._totals.ended(self._reports.pop(request_id))
