"""Prometheus: vLLM's own `/metrics` and, after it, the families of vllm_calidrop/metrics.py.

Engine processes keep the totals. Whichever API process answers a scrape shows the newest reading that any of them has
made, so a total never goes back, and shows it as it is: with several API processes nothing is added up. Only what API
processes count themselves is, by prometheus_client's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from vllm_calidrop import metrics
from vllm_calidrop.hooks.api import refusals
from vllm_calidrop.metrics import Metric

EngineStats = dict[str, Any]

# What each family shows of one engine's statistics, as (further labels, value).
_Samples = Iterable[tuple[tuple[str, ...], float]]
_OF_ENGINE: dict[Metric, Callable[[EngineStats], _Samples]] = {
    metrics.REQUESTS: lambda engine: _by_label(engine["totals"]["requests_by_mode"]),
    metrics.FALLBACKS: lambda engine: _by_label(engine["totals"]["fallbacks_by_reason"]),
    metrics.SWAP_WAITS: lambda engine: _one(engine["totals"]["swap_waits"]),
    metrics.KEPT_TOKENS: lambda engine: _one(engine["totals"]["kept_tokens"]),
    metrics.EVICTED_TOKENS: lambda engine: _one(engine["totals"]["evicted_tokens"]),
    metrics.KV_BLOCKS_FREED: lambda engine: _one(engine["kv_blocks"]["freed_total"]),
    metrics.KV_BLOCKS_USED: lambda engine: _one(engine["kv_blocks"]["used"]),
    metrics.KV_BLOCKS: lambda engine: _one(engine["kv_blocks"]["total"]),
    metrics.SEQUENCES: lambda engine: _one(engine["compacted_sequences"]),
    metrics.SWAP_BLOCKS_USED: lambda engine: _one(engine["swap"]["used_blocks"]),
    metrics.SWAP_BLOCKS: lambda engine: _one(engine["swap"]["total_blocks"]),
    metrics.SWAP_BLOCK_BYTES: lambda engine: _one(engine["swap"]["block_bytes"]),
    metrics.SKETCH_BLOCKS_USED: lambda engine: _one(engine["sketch"]["used_blocks"]),
    metrics.SKETCH_BLOCKS: lambda engine: _one(engine["sketch"]["total_blocks"]),
    metrics.BUFFER_PAGES_USED: lambda engine: _one(engine["buffer"]["used_pages"]),
    metrics.BUFFER_PAGES: lambda engine: _one(engine["buffer"]["total_pages"]),
    metrics.BYTES_OUT: lambda engine: _one(engine["totals"]["bytes_out"]),
    metrics.BYTES_IN: lambda engine: _one(engine["totals"]["bytes_in"]),
    **{
        metric: (lambda name: lambda engine: _by_place(engine["layers"][name]))(metric.name)
        for metric in metrics.LAYER_COUNTERS
    },
}
_HISTOGRAMS = (metrics.COMPACTION_SECONDS, metrics.SIMILARITY)


class EngineCollector:
    """A collector of prometheus_client over the engines' latest statistics."""

    def __init__(
        self, model: str, latest: Callable[[], list[EngineStats]], defaults_version: Callable[[], int]
    ) -> None:
        self._model = model
        self._latest = latest
        self._defaults_version = defaults_version

    def collect(self) -> Iterator[Family]:
        engines = self._latest()
        for metric, samples in _OF_ENGINE.items():
            family = _family(metric)
            for engine in engines:
                for labels, value in samples(engine):
                    family.add_metric([self._model, str(engine["engine"]), *labels], value)
            yield family
        for metric in _HISTOGRAMS:
            histogram = HistogramMetricFamily(metric.family, metric.help, labels=metric.labels)
            for engine in engines:
                counts, total = engine["histograms"][metric.name]
                histogram.add_metric([self._model, str(engine["engine"])], _cumulative(metric, counts), total)
            yield histogram
        version = _family(metrics.DEFAULTS_VERSION)
        version.add_metric([self._model], self._defaults_version())
        yield version


def count_refusals(model: str) -> None:
    """Count the requests that this process refuses; vLLM's registry adds up those of all API processes."""
    refused = metrics.REFUSED
    counter = Counter(refused.family, refused.help, refused.labels)
    by_reason = {reason: counter.labels(model, reason) for reason in refusals.REASONS}
    refusals.listen(lambda reason: by_reason[reason].inc())


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return cls(metric.family, metric.help, labels=metric.labels)


def _one(value: float) -> _Samples:
    return [((), value)]


def _by_label(values: dict[str, float]) -> _Samples:
    return [((label,), value) for label, value in values.items()]


def _by_place(values: list[float]) -> _Samples:
    return [((str(place),), value) for place, value in enumerate(values)]


def _cumulative(metric: Metric, counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many were at most the bound. counts: per bucket, one more for those above the last."""
    bounds = [*(f"{bound:g}" if bound % 1 else f"{bound:.1f}" for bound in metric.buckets), "+Inf"]
    return [(bound, sum(counts[: place + 1])) for place, bound in enumerate(bounds)]
