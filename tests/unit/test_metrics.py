"""The list of metric names: vLLM's and Prometheus' rules hold for every entry."""

from __future__ import annotations

import re

from vllm_calidrop import metrics
from vllm_calidrop.records import COUNTERS


def test_names_follow_the_rules() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert not metric.name.endswith(("_total", "_bucket", "_sum", "_count")), "added when exposed"
        assert metric.labels[0] == "model_name"
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(name.startswith("calidrop:") for name in metric.exposed)


def test_every_declared_metric_is_listed() -> None:
    declared = [value for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    assert sorted(m.name for m in declared) == sorted(m.name for m in metrics.METRICS)


def test_layer_counters_follow_the_records() -> None:
    assert tuple(metric.name for metric in metrics.LAYER_COUNTERS) == COUNTERS
    assert all("layer" in metric.labels for metric in metrics.LAYER_COUNTERS)
