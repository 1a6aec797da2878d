"""From stored answers to figures: means with bootstrap intervals, and what they cost, by cell, length and task."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy.cells import Cell, cells_of
from benchmarks.accuracy.config import Config
from benchmarks.accuracy.models import folder_of
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.store import read
from benchmarks.intervals import interval

Record = dict[str, Any]
ALL = "all"
PAGE_TOKENS = 16  # of the engine's swap pool


class ModelShape(NamedTuple):
    """What a report needs to be read as a rate; None where it is not known."""

    kv_heads: int | None


def shape_of(config: Config) -> ModelShape:
    if config.kv_heads is not None or config.server is None:
        return ModelShape(config.kv_heads)
    path = Path(folder_of(config.server.model)) / "config.json"
    if not path.exists():
        return ModelShape(None)
    model = json.loads(path.read_text())
    return ModelShape(model.get("num_key_value_heads") or model.get("num_attention_heads"))


def complete(records: Iterable[Record], samples: list[Sample], cells: list[Cell]) -> dict[str, list[Record]]:
    """The records by cell, only of samples every cell has answered, in the order of the samples. Answers to other
    prompts of the same name (the configuration's seed was changed) are left out."""
    found: dict[str, dict[str, Record]] = {cell.id: {} for cell in cells}
    asked = {sample.id: sample for sample in samples}
    for record in records:
        sample = asked.get(f"{record['task']}/{record['length']}/{record['index']}")
        if sample is None or record["cell"] not in found:
            continue
        same_seed = record["meta"].get("seed") == sample.meta.get("seed")
        if same_seed and record["answers"] == sample.answers:
            found[record["cell"]][sample.id] = record
    shared = [sample.id for sample in samples if all(sample.id in answers for answers in found.values())]
    return {cell: [answers[name] for name in shared] for cell, answers in found.items()}


def figures(records: list[Record], shape: ModelShape, resamples: int, seed: int) -> dict[str, Any]:
    """Score, interval and cost of some records of one cell; the score is the mean of the tasks' means. `low` and `high`
    are None where a task has too few prompts for an interval."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record["score"])
    low, high = interval(by_task, resamples, seed) or (None, None)
    return {
        "n": len(records),
        "score": float(np.mean([np.mean(values) for values in by_task.values()])),
        "low": low,
        "high": high,
        "prompt_tokens": _mean(record["prompt_tokens"] for record in records),
        "completion_tokens": _mean(record["completion_tokens"] for record in records),
        **cost(records, shape),
    }


def difference(records: list[Record], full: list[Record], resamples: int, seed: int) -> dict[str, Any]:
    """Score minus full KV's, prompt by prompt; `full` holds the same prompts in the same order. `low` and `high` are
    the 95 % interval, prompts drawn within each task, None where a task has too few."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for record, other in zip(records, full, strict=True):
        assert (record["task"], record["index"]) == (other["task"], other["index"])
        by_task[record["task"]].append(record["score"] - other["score"])
    low, high = interval(by_task, resamples, seed) or (None, None)
    return {"mean": float(np.mean([np.mean(values) for values in by_task.values()])), "low": low, "high": high}


def cost(records: list[Record], shape: ModelShape) -> dict[str, Any]:
    """What the server's reports say; None where it sent none.

    recompute_rate, merge_rate, plain_rate: shares of the decisions, one per step, layer and query head
    group_rate: reads of a KV head group's evicted KV, per step, layer and group
    read_fraction: share of all evicted KV read per step (below group_rate where the host keeps only a part of it)
    bytes_read: mean per request; recompute_by_layer: recompute_rate of each layer
    """
    reports = [record["report"] for record in records]
    if not all(reports):
        return {"reports": sum(map(bool, reports))}
    modes: dict[str, int] = defaultdict(int)
    for report in reports:
        modes[report["mode"] if not report["reason"] else f"{report['mode']} ({report['reason']})"] += 1
    sums = {name: sum(report[name] for report in reports) for name in ("recomputes", "merges", "plain")}
    decisions = sum(sums.values())
    per_layer = [report.get("layers") or {} for report in reports]  # absent where nothing was evicted
    layers = max((len(counts.get("recomputes", [])) for counts in per_layer), default=0)
    reads = read = possible = 0.0
    for record, report in zip(records, reports, strict=True):
        steps = max(0, (record["completion_tokens"] or 0) - 1)
        if not report["evicted"] or not shape.kv_heads:
            continue
        slots = steps * layers * shape.kv_heads
        stored = min(report["evicted"], record.get("calibration_size") or report["evicted"])
        reads += report["group_reads"]
        tokens = report["pages_read"] * PAGE_TOKENS if record.get("recall") else report["group_reads"] * stored
        read += tokens / report["evicted"]
        possible += slots
    by_layer = []
    for layer in range(layers):
        counts = [
            [by_name[name][layer] for by_name in per_layer if by_name.get(name)]
            for name in ("recomputes", "merges", "plain")
        ]
        total = sum(map(sum, counts))
        by_layer.append(sum(counts[0]) / total if total else 0.0)
    return {
        "reports": len(reports),
        "modes": dict(modes),
        "kept": _mean(report["kept"] for report in reports),
        "evicted": _mean(report["evicted"] for report in reports),
        "recompute_rate": sums["recomputes"] / decisions if decisions else 0.0,
        "merge_rate": sums["merges"] / decisions if decisions else 0.0,
        "plain_rate": sums["plain"] / decisions if decisions else 0.0,
        "group_rate": reads / possible if possible else (0.0 if shape.kv_heads else None),
        "read_fraction": read / possible if possible else (0.0 if shape.kv_heads else None),
        "bytes_read": _mean(report["bytes_read"] for report in reports),
        "recompute_by_layer": by_layer,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarize(config: Config, samples: list[Sample], folder: Path) -> dict[str, Any]:
    """Everything the report and the plots show; also what is committed as summary.json."""
    cells = cells_of(config.sweep)
    shape = shape_of(config)
    answers = complete(read(folder / "results.jsonl"), samples, cells)
    lengths = sorted({sample.length for sample in samples})
    tasks = list(dict.fromkeys(sample.task for sample in sorted(samples, key=lambda s: s.index)))
    full_cell = next((cell for cell in cells if cell.policy is None), None)
    rows = []
    for cell in cells:
        table: dict[str, dict[str, Any]] = {}
        for length in lengths:
            here = [record for record in answers[cell.id] if record["length"] == length]
            for record in here:
                record["calibration_size"], record["recall"] = cell.calibration_size, cell.recall is not None
            groups = {ALL: here} | {task: [record for record in here if record["task"] == task] for task in tasks}
            table[str(length)] = {
                name: figures(group, shape, config.bootstrap, config.seed) for name, group in groups.items() if group
            }
            if here and full_cell is not None and cell is not full_cell:
                full = [record for record in answers[full_cell.id] if record["length"] == length]
                table[str(length)][ALL]["against_full"] = difference(here, full, config.bootstrap, config.seed)
        rows.append(
            {
                "id": cell.id,
                "label": cell.label,
                "policy": cell.policy,
                "budget": cell.budget,
                "thresholds": cell.thresholds,
                "recall": cell.recall,
                "stored": cell.stored,
                "gate": cell.gate,
                "calibration_size": cell.calibration_size,
                "lengths": table,
            }
        )
    return {
        "name": config.name,
        "title": config.title,
        "seed": config.seed,
        "bootstrap": config.bootstrap,
        "kv_heads": shape.kv_heads,
        "tasks": tasks,
        "lengths": lengths,
        "asked_samples": len(samples),
        "complete_samples": len(next(iter(answers.values()), [])),
        "metrics": {sample.task: sample.metric for sample in samples},
        "task_seeds": {entry.suite: entry.seed for entry in config.tasks},
        "cells": rows,
    }
