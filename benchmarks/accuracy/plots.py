"""Pictures of a run, as PNG beside its report; each is drawn only where the run holds what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.accuracy.cells import NAMES, REUSE_OFF
from benchmarks.accuracy.store import read
from benchmarks.accuracy.summary import ALL

Row = dict[str, Any]
Picture = tuple[str, str]  # caption, file name
COLOURS = {"streaming_llm": "#0072b2", "h2o": "#d55e00", "snapkv": "#009e73"}
MARKERS = "osD^vP"

plt.rcParams.update({
    "figure.dpi": 130,
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
})  # fmt: skip


def draw(summary: dict[str, Any], folder: Path) -> list[Picture]:
    """All pictures the results allow; returns them in the order of the report."""
    pictures: list[Picture] = []
    for length in summary["lengths"][-2:]:  # of many lengths the longest
        for plot in (_accuracy_by_bytes, _frontier, _stored, _rate_by_layer, _calibration_size):
            pictures += plot(summary, str(length), folder)
    pictures += _needle_maps(summary, folder)
    return pictures


def save(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / name, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _error(totals: list[dict[str, Any]]) -> np.ndarray:
    """Distances of the interval's ends from the score, in percent: [2, n]; NaN, which draws nothing, without one."""
    ends = [(t["low"], t["high"]) if t["low"] is not None else (np.nan, np.nan) for t in totals]
    return 100 * np.array([[t["score"] - low, high - t["score"]] for t, (low, high) in zip(totals, ends)]).T.clip(0)


def _of(length: str) -> str:
    return f" at {length} tokens" if length != "0" else ""


# Accuracy against what is read again


def _accuracy_by_bytes(summary: dict[str, Any], length: str, folder: Path) -> list[Picture]:
    """A panel per budget. Left end of a line: evicted only. Lines join the cells of one policy by bytes; hollow: theta2
    = 2, no stored state is used."""
    rows = [row for row in summary["cells"] if ALL in row["lengths"][length]]
    measured = [row for row in rows if row["thresholds"] and "bytes_read" in row["lengths"][length][ALL]]
    budgets = list(dict.fromkeys(row["budget"] for row in measured))
    if not budgets:
        return []
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.2 * len(budgets), 3.4), sharey=True, squeeze=False)
    full = next((row["lengths"][length][ALL] for row in rows if row["policy"] is None), None)
    for ax, budget in zip(axes[0], budgets):
        if full:
            ax.axhline(100 * full["score"], color="#444444", linewidth=1, linestyle="--", label="full KV")
        for policy in dict.fromkeys(row["policy"] for row in measured):
            mine = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
            for hollow in (False, True):
                _cost_line(ax, mine, length, policy, hollow)
            _recall_points(ax, mine, length, policy)
        ax.set(title=f"KV size {budget}", xlabel="MB read again per answer")
        ax.set_xlim(left=-0.02 * ax.get_xlim()[1])
    axes[0][0].set(ylabel="score, %", ylim=(0, 103))
    axes[0][0].legend(fontsize=7.5, loc="best")
    save(figure, folder, name := f"accuracy_by_bytes_{length}.png")
    caption = (
        f"Accuracy against bytes read again{_of(length)}, with 95 % intervals. Labels: theta1. Filled: with the stored "
        "state merged above theta2; hollow: theta2 = 2, nothing stored is used; at 0: evicted only."
    )
    if any(row["recall"] is not None for row in rows):
        caption += " Stars: recall by pages."
    return [(caption, name)]


def _cost_line(ax: Axes, rows: list[Row], length: str, policy: str, hollow: bool) -> None:
    found = [
        row for row in rows if row["thresholds"] and (row["thresholds"][1] >= REUSE_OFF) == hollow and not row["stored"]
    ]
    if not found:
        return
    found.sort(key=lambda row: row["lengths"][length][ALL]["bytes_read"])
    found = [row for row in rows if row["thresholds"] is None and row["recall"] is None and not hollow] + found
    totals = [row["lengths"][length][ALL] for row in found]
    x = [total.get("bytes_read", 0) / 1e6 for total in totals]
    y = [100 * total["score"] for total in totals]
    ax.errorbar(
        x,
        y,
        _error(totals),
        color=COLOURS[policy],
        marker="o",
        markersize=4.5,
        markerfacecolor="white" if hollow else None,
        linewidth=1.1,
        linestyle=":" if hollow else "-",
        elinewidth=0.7,
        label=None if hollow else NAMES[policy],
    )
    if policy == "snapkv" and not hollow:
        for row, at_x, at_y in zip(found, x, y):
            if row["thresholds"]:
                label = f"{row['thresholds'][0]:g}".removeprefix("0")
                ax.annotate(label, (at_x, at_y), xytext=(3, 4), textcoords="offset points", fontsize=7)


def _recall_points(ax: Axes, rows: list[Row], length: str, policy: str) -> None:
    """Rows that recall by pages: a star each."""
    found = [row["lengths"][length][ALL] for row in rows if row["recall"] is not None]
    if found:
        x, y = [total["bytes_read"] / 1e6 for total in found], [100 * total["score"] for total in found]
        ax.plot(x, y, linestyle="", marker="*", markersize=9, color=COLOURS[policy], markeredgecolor="white")


# The frontier: recall of everything and by pages


def _frontier(summary: dict[str, Any], length: str, folder: Path) -> list[Picture]:
    """A panel per budget, drawn where rows recall by pages: score against the part of the evicted KV read per step."""
    rows = [row for row in summary["cells"] if row["lengths"][length].get(ALL, {}).get("read_fraction")]
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["recall"] is not None))
    if not budgets:
        return []
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.2 * len(budgets), 3.4), sharey=True, squeeze=False)
    full = next((row["lengths"][length][ALL] for row in summary["cells"] if row["policy"] is None), None)
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for ax, budget in zip(axes[0], budgets):
        if full:
            ax.axhline(100 * full["score"], color="#444444", linewidth=1, linestyle="--")
        for row in (row for row in rows if row["budget"] == budget):
            total, kind = row["lengths"][length][ALL], _kind(row)
            style = {"color": COLOURS[row["policy"]], "marker": MARKERS[kinds.index(kind) % len(MARKERS)]}
            at, score = total["read_fraction"], 100 * total["score"]
            ax.errorbar([at], [score], _error([total]), elinewidth=0.7, markersize=5, linestyle="", **style)
        ax.set(title=f"KV size {budget}", xlabel="part of the evicted KV read per step", xscale="log")
    for i, kind in enumerate(kinds):
        axes[0][0].plot([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color="#777777", label=kind)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        axes[0][0].plot([], [], linestyle="", marker="s", color=COLOURS[policy], label=NAMES[policy])
    axes[0][0].set(ylabel="score, %")
    axes[0][0].legend(fontsize=7, loc="best")
    save(figure, folder, name := f"frontier_{length}.png")
    caption = (
        f"Accuracy against what is read again{_of(length)}, with 95 % intervals: the paper's rule (`all`) and `pages`."
    )
    return [(f"{caption} Dashed: full KV.", name)]


def _kind(row: Row) -> str:
    """How a row recalls, whatever its policy and budget."""
    if row["recall"] is None:
        return "all " + "/".join(f"{theta:g}".removeprefix("0") for theta in row["thresholds"])
    return "pages" + "".join(f", {key.removeprefix('kv_recall_')} {value}" for key, value in row["recall"].items())


# How evicted KV is stored and read


def _stored(summary: dict[str, Any], length: str, folder: Path) -> list[Picture]:
    """Rows of one pair of thresholds by codec, calibration size and read budget, for the policy that has them."""
    rows = [row for row in summary["cells"] if row["lengths"][length].get(ALL, {}).get("bytes_read")]
    some = next((row for row in rows if row["stored"]), None)
    if some is None:
        return []
    same = ("policy", "budget", "thresholds", "gate")
    rows = [row for row in rows if all(row[name] == some[name] for name in same)]
    figure, ax = plt.subplots(figsize=(5.6, 3.6))
    for row in rows:
        total = row["lengths"][length][ALL]
        at, score = total["bytes_read"] / 1e6, 100 * total["score"]
        marker = "s" if "kv_read_budget" in row["stored"] else "^" if row["calibration_size"] else "o"
        ax.errorbar([at], [score], _error([total]), marker=marker, markersize=5, elinewidth=0.7, color="#0072b2")
        label = " ".join(row["label"].split()[2:]) or "none"
        ax.annotate(label, (at, score), xytext=(4, 4), textcoords="offset points", fontsize=7)
    ax.set(xlabel="MB read again per answer", ylabel="score, %", xscale="log")
    ax.set_title(f"{NAMES[some['policy']]}, KV size {some['budget']}", fontsize=9)
    save(figure, folder, name := f"stored_{length}.png")
    caption = (
        f"Accuracy against encoded bytes read again{_of(length)}, with 95 % intervals, by codec (`_plain`: without "
        "outlier tokens); triangles: calibration sizes, squares: read budgets."
    )
    return [(caption, name)]


# Fig. 3b


def _rate_by_layer(summary: dict[str, Any], length: str, folder: Path) -> list[Picture]:
    """One line per theta1, for the last policy and the middle budget (cells with the smallest theta2 of each)."""
    rows = [
        row
        for row in summary["cells"]
        if row["thresholds"] and row["lengths"][length].get(ALL, {}).get("recompute_by_layer")
    ]
    if not rows:
        return []
    policy = rows[-1]["policy"]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    budget = budgets[len(budgets) // 2]
    lines: dict[float, Row] = {}
    for row in rows:
        first = (row["policy"], row["budget"], row["gate"], row["calibration_size"])
        if first == (policy, budget, rows[0]["gate"], rows[0]["calibration_size"]):
            lines.setdefault(row["thresholds"][0], row)
    figure, ax = plt.subplots(figsize=(4.6, 3.2))
    for i, (theta1, row) in enumerate(sorted(lines.items())):
        rates = row["lengths"][length][ALL]["recompute_by_layer"]
        colour = plt.get_cmap("viridis")(i / max(1, len(lines) - 1) * 0.85)
        ax.plot(range(len(rates)), rates, marker=MARKERS[i % 6], markersize=4, color=colour, label=f"θ₁ = {theta1:g}")
    ax.set(xlabel="layer", ylabel="recomputed, share of decisions", ylim=(0, 1.02))
    ax.set_title(f"{NAMES[policy]}, KV size {budget}", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, folder, name := f"recompute_by_layer_{length}.png")
    return [(f"Recompute rate by layer and theta1{_of(length)} (the paper's Fig. 3b).", name)]


# Fig. 3c


def _calibration_size(summary: dict[str, Any], length: str, folder: Path) -> list[Picture]:
    """Accuracy against how many evicted tokens the host keeps; none and all included."""
    rows = [row for row in summary["cells"] if ALL in row["lengths"][length] and row["policy"]]
    if not any(row["calibration_size"] for row in rows):
        return []
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.2 * len(budgets), 3.2), sharey=True, squeeze=False)
    for ax, budget in zip(axes[0], budgets):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
            pair = next(row["thresholds"] for row in mine if row["thresholds"])
            sizes = {}
            for row in mine:
                if row["thresholds"] in (None, pair) and row["recall"] is None and not row["stored"]:
                    size = 0 if row["thresholds"] is None else row["calibration_size"] or np.inf
                    sizes[size] = row["lengths"][length][ALL]
            order = sorted(sizes)
            totals = [sizes[size] for size in order]
            scores = [100 * total["score"] for total in totals]
            ax.errorbar(
                range(len(order)), scores, _error(totals), marker="o", color=COLOURS[policy], label=NAMES[policy]
            )
            names = {0: "none", np.inf: "all"}
            ax.set_xticks(range(len(order)), [names.get(size, f"{size:g}") for size in order])
        ax.set(title=f"KV size {budget}", xlabel="evicted tokens kept on the host")
    axes[0][0].set(ylabel="score, %", ylim=(0, 103))
    axes[0][0].legend(loc="lower right")
    save(figure, folder, name := f"calibration_size_{length}.png")
    return [(f"Accuracy against calibration size{_of(length)} (the paper's Fig. 3c).", name)]


# Figs. 2, 4 to 11


def _needle_maps(summary: dict[str, Any], folder: Path) -> list[Picture]:
    """A map of depth by length for every cell; full KV first, then a figure per budget."""
    records = [record for record in read(folder / "results.jsonl") if "depth" in (record["meta"] or {})]
    if not records:
        return []
    depths = sorted({record["meta"]["depth"] for record in records})
    lengths = sorted({record["length"] for record in records})
    maps = {}
    for row in summary["cells"]:
        cell = np.full((len(depths), len(lengths)), np.nan)
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                found = [
                    record["score"]
                    for record in records
                    if (record["cell"], record["meta"]["depth"], record["length"]) == (row["id"], depth, length)
                ]
                if found:
                    cell[i, j] = np.mean(found)
        maps[row["id"]] = cell
    pictures = []
    for budget in dict.fromkeys(row["budget"] for row in summary["cells"]):
        rows = [row for row in summary["cells"] if row["budget"] == budget]
        name = f"needle_{budget or 'full'}.png"
        _map_figure(rows, maps, depths, lengths, folder, name)
        pictures.append((f"Needle in a haystack, KV size {budget or 'full'}: share of the needle found.", name))
    return pictures


def _map_figure(
    rows: list[Row], maps: dict[str, np.ndarray], depths: list[float], lengths: list[int], folder: Path, name: str
) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [[row for row in rows if row["policy"] == policy] for policy in policies]
    across = max(map(len, lines))
    size = (1.2 + across * (1.0 + 0.32 * len(lengths)), len(lines) * (0.95 + 0.17 * len(depths)))
    figure, axes = plt.subplots(len(lines), across, figsize=size, squeeze=False, layout="constrained")
    image = None
    for line, axes_of_line in zip(lines, axes):
        for ax in axes_of_line[len(line) :]:
            ax.axis("off")
        for row, ax in zip(line, axes_of_line):
            image = ax.imshow(maps[row["id"]], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            ax.grid(False)
            label = row["label"] if row["thresholds"] is None else f"{NAMES[row['policy']]} {row['label']}"
            ax.set_title(f"{label}: {100 * np.nanmean(maps[row['id']]):.1f}", fontsize=8)
            ax.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45, fontsize=7)
            ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths], fontsize=7)
        axes_of_line[0].set_ylabel("depth, %")
    for ax in axes[-1]:
        ax.set_xlabel("tokens")
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.8, label="found")
    save(figure, folder, name)
