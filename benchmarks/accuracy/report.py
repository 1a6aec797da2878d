"""report.md: tables laid out like the paper's, and what each row cost."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.cells import NAMES
from benchmarks.accuracy.summary import ALL
from benchmarks.intervals import LEAST

Row = dict[str, Any]


def markdown(summary: dict[str, Any], run: dict[str, Any], layout: str, pictures: list[tuple[str, str]]) -> str:
    """`pictures`: (caption, file) pairs shown at the end."""
    parts = [f"# {summary['title'] or summary['name']}", _setting(summary, run)]
    parts += _warnings(summary)
    for length in summary["lengths"]:
        name = f"{length} tokens" if length else "lengths of the data"
        if not any(ALL in row["lengths"][str(length)] for row in summary["cells"]):
            continue
        parts.append(f"## {name}")
        tables = _grid if layout == "thresholds" else _methods
        parts.append(tables(summary, str(length)))
        parts.append(f"### What it cost at {name}")
        parts.append(_costs(summary, str(length)))
    if pictures:
        parts.append("## Pictures")
        parts += [f"{caption}\n\n![{caption}]({file})" for caption, file in pictures]
    return "\n\n".join(parts) + "\n"


def _setting(summary: dict[str, Any], run: dict[str, Any]) -> str:
    per_task = summary["complete_samples"] / max(1, len(summary["tasks"]) * len(summary["lengths"]))
    metrics = ", ".join(sorted(set(summary["metrics"].values())))
    seeds = ", ".join(f"{name} {seed}" for name, seed in summary["task_seeds"].items())
    lines = [
        f"Model `{run['model']}`" + (f" (weights {run['fingerprint']})" if run.get("fingerprint") else "") + ", "
        f"{run['mode']} mode, greedy. {summary['complete_samples']} of {summary['asked_samples']} prompts, "
        f"{per_task:g} per task and length, the same in every row. Metric: {metrics}; scores are percentages. "
        f"First seed: {seeds}.",
        "±: half of the 95 % bootstrap interval of the average "
        f"({summary['bootstrap']} resamples of the prompts within each task, seed {summary['seed']}); none where a "
        f"task has fewer than {LEAST} prompts.",
    ]
    if run.get("source"):
        lines.append(f"{run['source']['title']}: {run['source']['note']}, {run['source']['licence']}.")
    if run.get("versions"):
        versions = (f"{name} {version}" for name, version in run["versions"].items())
        lines.append(f"Measured with {', '.join(versions)}.")
    return "\n".join(lines)


def _warnings(summary: dict[str, Any]) -> list[str]:
    """What a reader must not miss: rows whose setting the server did not apply."""
    found = []
    if summary["complete_samples"] < summary["asked_samples"]:
        found.append("the run was cut short: only prompts that every row has answered are counted")
    for row in summary["cells"]:
        for length, tasks in row["lengths"].items():
            total = tasks.get(ALL)
            if row["policy"] is None or total is None:
                continue
            where = f"{row['label']} {row['budget']} at {length}"
            if total["reports"] < total["n"]:
                found.append(f"{where}: {total['n'] - total['reports']} answers came without a `calidrop` report")
                continue
            evicted_only = row["thresholds"] is None and row["recall"] is None
            wanted = "evict (calibration_off)" if evicted_only else "calidrop"
            other = {mode: count for mode, count in total["modes"].items() if mode != wanted}
            if other:
                found.append(f"{where}: not compressed as asked: {other}")
    return ["\n".join(f"- **Note**: {line}" for line in found)] if found else []


def _methods(summary: dict[str, Any], length: str) -> str:
    """Tables 1, 3, 4: a section per KV size, a row per method, its +CaliDrop rows under it; best average in bold."""
    best: dict[int, float] = {}
    for row in summary["cells"]:
        if row["policy"] and ALL in row["lengths"][length]:
            best[row["budget"]] = max(best.get(row["budget"], 0), row["lengths"][length][ALL]["score"])
    tasks = summary["tasks"]
    head = ["Method", *tasks, "Avg.", "±"]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    size: Any = object()
    for row in summary["cells"]:
        figures = row["lengths"][length]
        if ALL not in figures:
            continue
        if row["budget"] != size:
            size = row["budget"]
            if size is None:
                lines.append(_line(["tokens", *(f"{figures[t]['prompt_tokens']:.0f}" for t in tasks), "", ""]))
            lines.append(_line([f"**KV size = {size or 'full'}**", *[""] * (len(head) - 1)]))
        scores = _scores(figures, tasks)
        if row["policy"] and figures[ALL]["score"] == best[row["budget"]] > 0:
            scores[-2] = f"**{scores[-2]}**"
        lines.append(_line([_name(summary, row), *scores]))
    return "\n".join(lines)


def _name(summary: dict[str, Any], row: Row) -> str:
    """The row's label; with its policy where no evicted-only row above says which one it is."""
    heads = any((r["policy"], r["thresholds"], r["recall"]) == (row["policy"], None, None) for r in summary["cells"])
    return str(row["label"]) if heads or row["policy"] is None else f"{NAMES[row['policy']]} {row['label']}"


def _grid(summary: dict[str, Any], length: str) -> str:
    """Table 2: a group of rows per theta2 (R), a row per theta1 (L)."""
    tasks = summary["tasks"]
    head = ["Group", "", *tasks, "AVG", "±", "recomputed"]
    lines = [_line(head), _line(["---", "---"] + ["---:"] * (len(head) - 2))]
    shown: Any = None
    others = [row for row in summary["cells"] if row["thresholds"] is None]
    pairs = sorted((row for row in summary["cells"] if row["thresholds"]), key=lambda r: r["thresholds"][::-1])
    for row in [*others, *pairs]:
        figures = row["lengths"][length]
        if ALL not in figures:
            continue
        group, name = row["label"], ""
        if row["thresholds"]:
            theta1, theta2 = row["thresholds"]
            group, shown = ("" if theta2 == shown else f"R={theta2:.2f}"), theta2
            name = f"L={theta1:.2f}"
        lines.append(_line([group, name, *_scores(figures, tasks), _percent(figures[ALL].get("recompute_rate"))]))
    return "\n".join(lines)


def _scores(figures: dict[str, Any], tasks: list[str]) -> list[str]:
    total = figures[ALL]
    half = "" if total["low"] is None else f"{100 * (total['high'] - total['low']) / 2:.1f}"
    each = [f"{100 * figures[task]['score']:.2f}" if task in figures else "" for task in tasks]
    return [*each, f"{100 * total['score']:.2f}", half]


def _costs(summary: dict[str, Any], length: str) -> str:
    head = [
        "KV size",
        "Method",
        "score [95 %]",
        "minus full KV [95 %]",
        "n",
        "recompute, per head",
        "look, per head",
        "merge",
        "kept only",
        "reads, per group",
        "evicted KV read per step",
        "MB read per answer",
        "recompute or look by layer",
    ]
    lines = [_line(head), _line(["---", "---"] + ["---:"] * (len(head) - 2))]
    for row in summary["cells"]:
        total = row["lengths"][length].get(ALL)
        if total is None:
            continue
        score = _with_interval(total["score"], total)
        against = total.get("against_full")
        less = _with_interval(against["mean"], against, "+") if against else ""
        calibrated = (row["thresholds"] or row["recall"] is not None) and "recompute_rate" in total
        cells = [""] * 8
        if calibrated:
            # What the report of a request counts as a recomputation is a look at the sketch where recall is by pages.
            renewed = [_percent(total["recompute_rate"]), ""]
            cells = [
                *(renewed if row["recall"] is None else reversed(renewed)),
                *(_percent(total[name]) for name in ("merge_rate", "plain_rate")),
                *(_percent(total[name]) for name in ("group_rate", "read_fraction")),
                f"{total['bytes_read'] / 1e6:.2f}",
                " ".join(f"{rate:.2f}" for rate in total["recompute_by_layer"]),
            ]
        lines.append(_line([str(row["budget"] or "full"), _name(summary, row), score, less, str(total["n"]), *cells]))
    return "\n".join(lines)


def _with_interval(value: float, bounds: dict[str, Any], sign: str = "") -> str:
    """In percent, with the interval's ends where there is one."""
    text = f"{100 * value:{sign}.1f}"
    if bounds["low"] is None:
        return text
    return f"{text} [{100 * bounds['low']:{sign}.1f}, {100 * bounds['high']:{sign}.1f}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %" if value >= 0.05 or not value else f"{100 * value:.2f} %"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
