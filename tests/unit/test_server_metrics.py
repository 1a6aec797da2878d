"""What the server shows to Prometheus, from statistics of two engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_calidrop import metrics
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.scheduler.totals import Totals
from vllm_calidrop_server.exposition import EngineCollector
from vllm_calidrop_server.newest import Newest, newest


def stats(engine: int, read: int = 1, **totals: Any) -> dict[str, Any]:
    own = Totals(Shape(block_size=16, num_layers=2, num_kv_heads=1, num_query_heads=1, head_dim=1, dtype=torch.float16))
    vars(own).update(totals)
    return {
        "engine": engine,
        "read": read,
        "sequences": [{"request_id": "secret"}],
        "compacted_sequences": 1,
        "swap": {"used_blocks": 3, "total_blocks": 10, "block_bytes": 64},
        "sketch": {"used_blocks": 0, "total_blocks": 5},
        "buffer": {"used_pages": 0, "total_pages": 6},
        "kv_blocks": {"used": 2, "total": 7, "freed_total": own.kv_blocks_freed},
        "layers": own.layers_with([]),
        "totals": own.as_dict([]),
        "histograms": own.histograms(),
    }


def samples(engines: list[dict[str, Any]]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(EngineCollector("m", lambda: engines, lambda: 4))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_family_of_the_list_is_shown_under_its_names_and_labels() -> None:
    shown = samples([stats(0)])
    for metric in metrics.METRICS:
        if metric is metrics.REFUSED:  # counted by the API processes
            continue
        for name in metric.exposed:
            labels = [dict(labels) for found, labels in shown if found == name]
            assert labels, name
            assert set(labels[0]) - {"le"} == set(metric.labels)
    declared = {name for metric in metrics.METRICS for name in metric.exposed}
    assert {name for name, _ in shown} <= declared


def test_engines_are_told_apart_and_not_added_up() -> None:
    shown = samples([stats(0, kept_tokens=5), stats(1, kept_tokens=7)])
    name = "calidrop:kept_tokens_total"
    assert [shown[name, (("engine", str(rank)), ("model_name", "m"))] for rank in (0, 1)] == [5, 7]
    assert shown["calidrop:defaults_version", (("model_name", "m"),)] == 4


def test_histogram_buckets_are_cumulative() -> None:
    engine = stats(0)
    counts = [1, 0, 2] + [0] * (len(metrics.SIMILARITY.buckets) - 3) + [1]
    engine["histograms"][metrics.SIMILARITY.name] = (counts, 1.5)
    shown = samples([engine])
    labels = (("engine", "0"), ("model_name", "m"))

    def bucket(bound: str) -> float:
        return shown["calidrop:similarity_bucket", tuple(sorted([*labels, ("le", bound)]))]

    assert [bucket("0.0"), bucket("0.2"), bucket("0.4"), bucket("1.0"), bucket("+Inf")] == [1, 1, 3, 3, 4]
    assert shown["calidrop:similarity_count", labels] == 4
    assert shown["calidrop:similarity_sum", labels] == 1.5


def test_of_each_engine_the_newest_reading_counts() -> None:
    mine = [stats(0, read=3, kept_tokens=30), stats(1, read=9, kept_tokens=90)]
    other = [stats(0, read=4, kept_tokens=40), stats(1, read=8, kept_tokens=80)]
    for readings in ((mine, other), (other, mine)):
        assert [(e["engine"], e["read"]) for e in newest(*readings)] == [(0, 4), (1, 9)]


def test_processes_share_the_newest_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    first, second = Newest(), Newest()
    assert first.get() == []
    first.put([stats(0, read=2)])
    assert [engine["read"] for engine in second.get()] == [2]
    second.put([stats(0, read=1)])  # asked earlier, answered later
    assert [engine["read"] for engine in first.get()] == [engine["read"] for engine in second.get()] == [2]
    second.put([stats(0, read=5)])
    assert first.get()[0]["read"] == 5
    assert "secret" not in json.dumps(first.get())


def test_one_process_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    alone = Newest()
    alone.put([stats(0, read=2)])
    assert alone.get()[0]["read"] == 2
