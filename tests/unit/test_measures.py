"""Histograms that a worker keeps: which bucket, which sum, and that they reach the scheduler's totals."""

from __future__ import annotations

import pytest
import torch

from vllm_calidrop.metrics import COMPACTION_SECONDS, SIMILARITY
from vllm_calidrop.ops.similarity import observe_similarity, similarity_histogram
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.scheduler.totals import Totals
from vllm_calidrop.worker.measures import Measures


def bucket(bound: float) -> int:
    return SIMILARITY.buckets.index(bound)


def test_a_similarity_falls_under_the_first_bound_it_does_not_exceed() -> None:
    histogram = similarity_histogram()
    observe_similarity(histogram, torch.tensor([[-0.7, 0.0], [0.1, 0.7], [0.71, 1.0000001], [torch.nan, 0.99]]))
    expected = dict.fromkeys(range(len(SIMILARITY.buckets) + 1), 0)
    expected |= {bucket(0.0): 2, bucket(0.2): 1, bucket(0.7): 1, bucket(0.75): 1, bucket(1.0): 2}
    assert histogram[:-1].tolist() == list(expected.values())
    assert Measures(histogram).snapshot().similarity.total == pytest.approx(
        -0.7 + 0.1 + 0.7 + 0.71 + 1 + 0.99, abs=1e-5
    )


def test_nothing_observed() -> None:
    histogram = similarity_histogram()
    observe_similarity(histogram, torch.empty(0, 2))
    assert histogram.sum() == 0


def test_compactions() -> None:
    measures = Measures(similarity_histogram())
    for seconds in (0.0005, 0.001, 0.15, 100.0):
        measures.compacted(seconds)
    found = measures.snapshot().compaction_seconds
    assert found.counts[0] == 2
    assert found.counts[COMPACTION_SECONDS.buckets.index(0.2)] == 1
    assert found.counts[-1] == 1
    assert found.total == pytest.approx(100.1515)


def test_the_latest_measures_are_the_totals() -> None:
    totals = Totals(Shape(2, 1, 1, 16, torch.float32, block_size=16))
    histogram = similarity_histogram()
    measures = Measures(histogram)
    first = measures.snapshot()
    observe_similarity(histogram, torch.tensor([0.5, 0.6]))
    measures.compacted(0.3)
    assert sum(first.similarity.counts) == 0, "a copy"
    for snapshot in (first, measures.snapshot()):
        totals.measured(snapshot)
    totals.measured(None)
    shown = totals.histograms()
    assert sum(shown["similarity"][0]) == 2
    assert shown["similarity"][1] == pytest.approx(1.1)
    assert sum(shown["compaction_seconds"][0]) == 1
