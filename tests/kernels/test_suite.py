"""The GPU suite at toy size, end to end: every part runs, finds what is wrong, and writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import correctness
from benchmarks.kernels.__main__ import failures, main
from benchmarks.kernels.cases import Shape
from benchmarks.kernels.device import synchronisations


def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--toy", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["interpreter"] and found["toy"]
    kernels = [row["kernel"] for row in found["correctness"]]
    checks = ["decode step", "decode step, codecs", "scores", "compaction", "decode step, xFormers"]
    assert kernels == checks * len(correctness.TOY_SHAPES)
    assert [row["kernel"] for row in found["bandwidth"]] == ["decode", "reload", "reload int4"]
    assert found["bandwidth"][0]["bytes"] == 2 * 40 * 2 * 2 * 32 * 4  # rows, tokens, KV heads, K and V, D, float32
    assert [row["synchronisations"] for row in found["step"]] == [{}]
    full, kept = found["times"]
    assert full["full_xformers_launched"] > 0 and kept["recompute_xformers_launched"] > 0
    assert "| decode step, xFormers |" in capsys.readouterr().out


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "TOLERANCE", {torch.float16: 0.0})
    monkeypatch.setattr(correctness, "TOY_SHAPES", [Shape(kv_heads=1, group=1, head_dim=32, dtype=torch.float16)])
    monkeypatch.setattr(correctness, "ROWS", correctness.ROWS[1:2])
    found = {"correctness": list(correctness.check_all(torch.device("cpu"), toy=True))}
    assert {"decode step", "compaction"} <= {row["kernel"] for row in failures(found)}
    step = {"synchronisations": {}, "graph_equals_launch": None}
    assert not failures({"step": [step]})
    waits = [step | {"synchronisations": {"cudaStreamSynchronize": 1}}, step | {"graph_equals_launch": False}]
    assert failures({"step": waits}) == waits


def test_what_makes_the_host_wait_is_counted() -> None:
    number, device = torch.ones(1), torch.device("cpu")
    assert synchronisations(number.item, device, 3)["aten::item"] == 3
    assert synchronisations(number.clone, device, 3) == {}


def test_a_gpu_is_asked_for() -> None:
    with pytest.raises(SystemExit, match="a GPU is needed"):
        main([])
