"""What an answer is worth, in [0, 1], by the metric's name. More are added by the suites."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.accuracy.samples import Sample

Metric = Callable[[str, Sample], float]


def exact(text: str, sample: Sample) -> float:
    """Every word right, nothing before and nothing after."""
    return float(any(text.split() == answer.split() for answer in sample.answers))


METRICS: dict[str, Metric] = {"exact": exact}


def score(text: str, sample: Sample) -> float:
    return METRICS[sample.metric](text, sample)
