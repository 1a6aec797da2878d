"""The figures of docs/performance.md are those of the committed result files."""

from __future__ import annotations

import json

from benchmarks.throughput import summary


def test_the_document_says_what_was_measured() -> None:
    text = summary.DOCUMENT.read_text()
    assert text == summary.put(text, summary.table(json.loads(summary.RESULTS.read_text())))


def test_figures_come_from_the_rows() -> None:
    row = {"name": "paper", "load": {"concurrency": 16}}
    figures = {
        ("stock", 0): (100.0, 10.0, 5.0), ("stock", 1): (50.0, 20.0, 10.0), ("no budget", 0): (99.0, 11.0, 5.0),
        ("no budget", 1): (51.0, 20.0, 12.0), ("eviction only", 0): (200.0, 5.0, 2.0),
        ("CaliDrop .7/.85", 0): (150.0, 6.0, 3.0),
    }  # fmt: skip
    names = ("output_throughput", "processor_seconds", "p50_tpot_ms")
    rows = [
        {**row, "variant": variant, "repeat": repeat, **dict(zip(names, values))}
        for (variant, repeat), values in figures.items()
    ]
    rows.append({**rows[0], "load": {"concurrency": 4}, "output_throughput": 1.0})
    lines = summary.table({"serve": rows}).splitlines()[2:]
    measured = [line.split(" | ")[-1].removesuffix(" |") for line in lines]
    medians = ["1.00 (0.99)", "1.05 (1.10)", "1.10 (1.00)"]  # and the fastest repeats
    assert measured == [*medians, "0.75 (0.75)", "1.20 (1.20)", "1.50 (1.50)"]
    coded = {**rows[5], "variant": "CaliDrop .7/.85, int8", "output_throughput": 180.0}
    assert "int8, to eviction only: output tokens/s |  | 0.90 (0.90) |" in summary.table({"serve": [*rows, coded]})
    longer = [
        {**row, "name": "without a budget", "output_throughput": 2 * row["output_throughput"]} for row in rows[:1]
    ]
    longer.append({**rows[2], "name": "without a budget"})
    assert "to stock: output tokens/s | ≥ 0.98 | 0.49 (0.49) |" in summary.table({"serve": rows + longer})


def test_parts_that_were_not_run_are_left_out() -> None:
    assert len(summary.table({}).splitlines()) == 2
    text = f"a\n{summary.BEGIN}\nold\n{summary.END}\nb"
    assert summary.put(text, "new") == f"a\n{summary.BEGIN}\nnew\n{summary.END}\nb"
