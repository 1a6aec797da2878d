"""Pictures of runs with known answers, and the arithmetic behind Fig. 1."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import plots, report, run, summary
from benchmarks.accuracy.config import Config
from benchmarks.accuracy.figure1 import LAGS, Layer, Watched, calibration_error, cosine_by_distance
from benchmarks.accuracy.stub import Body, Stub
from tests.reference.settings import Settings
from tests.unit.test_accuracy_run import report_of

MODEL = Path(__file__).parents[2] / "benchmarks" / "small_model" / "smooth"


def measured(config: Config, folder: Path) -> dict[str, Any]:
    """A run against a stub that knows every answer where calibration is on."""
    samples = run.samples_for(config, str(MODEL), None)
    answers = {sample.prompt + sample.prefix: sample.answers[0] for sample in samples}

    def answer(body: Body) -> str:
        return answers[body["prompt"]] if body.get("kv_calibration", True) else "unknown"

    with Stub(answer, report=report_of) as stub:
        assert asyncio.run(run.execute(config, samples, stub.url, folder, None)) == []
    return summary.summarize(config, samples, folder)


def test_pictures_of_a_sweep(tmp_path: Path) -> None:
    tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 3}]
    sweep = {"policies": ["h2o", "snapkv"], "reuse_off": [0.7], "calibration_sizes": [8, "all"]}
    figures = measured(Config.model_validate({"name": "t", "kv_heads": 2, "tasks": tasks, "sweep": sweep}), tmp_path)
    pictures = plots.draw(figures, tmp_path)
    assert [name for _, name in pictures] == [
        "accuracy_by_bytes_96.png",
        "recompute_by_layer_96.png",
        "calibration_size_96.png",
    ]
    assert all((tmp_path / name).stat().st_size > 5000 for _, name in pictures)


def test_frontier_of_recall(tmp_path: Path) -> None:
    """Only the policies asked for have rows of the paper's rule; the picture exists where rows recall by pages."""
    tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 3}]
    sweep = {"policies": ["h2o", "snapkv"], "evicted_only": False, "threshold_policies": ["snapkv"], "recall": [{}]}
    figures = measured(Config.model_validate({"name": "t", "kv_heads": 2, "tasks": tasks, "sweep": sweep}), tmp_path)
    assert [(row["policy"], row["label"]) for row in figures["cells"]] == [
        (None, "FullKV"), ("h2o", "+pages"), ("snapkv", "+CaliDrop .70/.85"), ("snapkv", "+pages"),
    ]  # fmt: skip
    run_of = {"model": "m", "mode": "completion"}
    assert "| SnapKV +pages |" in report.markdown(figures, run_of, "policies", [])
    assert "frontier_96.png" in [name for _, name in plots.draw(figures, tmp_path)]
    assert (tmp_path / "frontier_96.png").stat().st_size > 5000


def test_picture_of_codecs(tmp_path: Path) -> None:
    tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 2}]
    stored = [{"kv_codec": "int8"}, {"kv_read_budget": 9}, {"kv_calibration_size": 8}]
    sweep = {"policies": ["snapkv"], "full": False, "evicted_only": False, "stored": stored}
    figures = measured(Config.model_validate({"name": "t", "kv_heads": 2, "tasks": tasks, "sweep": sweep}), tmp_path)
    assert "stored_96.png" in [name for _, name in plots.draw(figures, tmp_path)]


def test_needle_maps(tmp_path: Path) -> None:
    tasks = [{"suite": "niah", "lengths": [256, 512], "count": 1, "options": {"depths": [0.0, 0.5, 1.0]}}]
    figures = measured(Config.model_validate({"name": "t", "kv_heads": 2, "tasks": tasks}), tmp_path)
    names = [name for _, name in plots.draw(figures, tmp_path)]
    assert {"needle_full.png", "needle_64.png"} <= set(names)
    rows = {row["label"]: row["lengths"]["512"]["all"]["score"] for row in figures["cells"]}
    assert rows["FullKV"] == rows["+CaliDrop .70/.85"] == 1 and rows["SnapKV"] == 0


def test_thresholds_are_laid_out_as_in_table_2(tmp_path: Path) -> None:
    tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 2}]
    sweep = {"policies": ["snapkv"], "thresholds": [(0.6, 0.8), (0.6, 0.85), (0.7, 0.8)]}
    config = Config.model_validate({"name": "t", "layout": "thresholds", "tasks": tasks, "sweep": sweep, "kv_heads": 2})
    figures = measured(config, tmp_path)
    text = report.markdown(figures, {"model": "m", "mode": "completion"}, config.layout, [])
    lines = [line for line in text.splitlines() if "L=" in line]
    assert [line.split("|")[1:3] for line in lines] == [
        [" R=0.80 ", " L=0.60 "],
        ["  ", " L=0.70 "],
        [" R=0.85 ", " L=0.60 "],
    ]


@pytest.fixture(scope="module")
def layer() -> Layer:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 80, 16), torch.randn(2, 80, 16), torch.randn(2, 80, 16)
    return Layer(q, k, v, 0.25)


def test_calibration_with_the_same_query_is_exact(layer: Layer) -> None:
    before, after, rho = calibration_error(layer, 60, 0, Settings(kv_budget=20))
    assert before > 0.01 and after < 1e-6 and rho == pytest.approx(1)
    _, other, _ = calibration_error(layer, 60, 5, Settings(kv_budget=20))
    assert other > 0.01


def test_cosine_by_distance(layer: Layer) -> None:
    values = cosine_by_distance(layer, 60)
    assert values.shape == (LAGS,)
    q = layer.q
    by_hand = [
        torch.cosine_similarity(q[i, j, t], q[i, j, t - 3], dim=0)
        for i in (0, 1)
        for j in (0, 1)
        for t in range(60, 80)
    ]
    assert values[2] == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-6)


def test_watched_model_sees_every_layer() -> None:
    """Queries and keys after RoPE: attention over them is what the model computes next."""
    watched = Watched(str(MODEL), torch.float32)
    layers = watched.layers(list(range(20, 60)))
    assert len(layers) == 4
    assert layers[0].q.shape == (2, 2, 40, 64) and layers[0].k.shape == (2, 40, 64)
