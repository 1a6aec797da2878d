"""What an engine says of its requests: a report per request, and the model's shape that its bytes follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_calidrop.algorithm.shape import KVShape
from vllm_calidrop.evicted.codecs import Codec, codec_of
from vllm_calidrop.evicted.layout import pages_for
from vllm_calidrop.records import COUNTERS, SequenceCounters

_GROUP_READS, _PAGES_READ = COUNTERS.index("group_reads"), COUNTERS.index("pages_read")


@dataclass(frozen=True)
class Shape(KVShape):
    """What the ledger must know of the model. block_size: tokens of vLLM's KV blocks. ranks: how many there are
    (tensor parallel)."""

    block_size: int
    ranks: int = 1

    def codec(self, name: str) -> Codec:
        return codec_of(name, self.head_dim, self.dtype)


@dataclass
class Report:
    """What the answer's `calidrop` object says; counters accumulate over preemptions.

    read_bytes: of one read: a KV head group's stored tokens, or a page where they are recalled by pages.
    counted, compacted: whether the request is in the engine's totals already. told: whether the API process has it as
    it is.
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
    told: bool = False

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


def kept_whole(prompt_len: int, reason: str) -> Report:
    """Of a request from which nothing is evicted."""
    return Report(prompt_len, kept=prompt_len, evicted=0, mode="full", reason=reason, stored=0)
