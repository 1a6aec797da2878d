"""The results in some lines, beside what was aimed at; docs/performance.md has this table between two markers.

python -m benchmarks.throughput.summary        # writes it into docs/performance.md, from the committed results
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "throughput" / "results.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- throughput: written by python -m benchmarks.throughput.summary -->", "<!-- /throughput -->"
Row = dict[str, Any]


def main() -> int:
    DOCUMENT.write_text(put(DOCUMENT.read_text(), table(json.loads(RESULTS.read_text()))))
    return 0


def put(text: str, section: str) -> str:
    """`text` with `section` between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def table(results: Row) -> str:
    """Markdown: what, aimed at, measured. Parts that were not run are left out."""
    lines = [("", "aimed at", "measured"), ("---", "---", "---")]
    for part, rows in (("ops", _ops), ("steps", _steps), ("compaction", _compaction), ("pool", _pool),
                       ("serve", _serve), ("memory", _memory)):  # fmt: skip
        if part in results:
            lines += rows(results[part])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ops(found: Row) -> list[tuple[str, str, str]]:
    ratios = sorted(row["native_to_stock"]["median"] for row in found["operators"])
    reload = [
        f"{row['best_seconds_per_gib']['reload']:.2f} s per GiB at {row['case']['stored']} tokens"
        f" ({row['best_seconds_per_gib']['read']:.2f} s a plain read)"
        for row in found["reload"]
        if row["case"]["stored"] >= 4096 and row["case"]["head_dim"] == 64
    ]
    coded = {row["case"]["codec"]: row for row in found["reload"] if _is_wide(row["case"])}
    codecs = ", ".join(
        f"{name} {row['best_seconds_per_gib']['reload'] / coded['none']['best_seconds_per_gib']['reload']:.2f}"
        for name, row in coded.items()
        if name != "none"
    )
    return [
        ("decode operator, to vLLM's at equal kept length", "≤ 1.5", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"),
        ("evicted KV read again, every group recomputing", "published", "; ".join(reload)),
        *([("the same from codes, head_dim 128, bfloat16, to none", "published", codecs)] if codecs else []),
    ]


def _is_wide(case: Row) -> bool:
    return bool(case["head_dim"] == 128 and case["dtype"] == "bfloat16")


def _steps(found: list[Row]) -> list[tuple[str, str, str]]:
    (model, *_) = dict.fromkeys(row["model"] for row in found)
    of = {(row["case"], row["length"]): row for row in found if row["model"] == model}

    def ratio(case: str, length: int) -> float:
        return float(of[case, length]["ours_to_stock"]["median"])

    lengths = sorted(length for case, length in of if case == "eviction only")
    compared = 4096 if 4096 in lengths else lengths[-1]
    growth = ratio("eviction only", lengths[-1]) / ratio("eviction only", lengths[0])
    return [
        ("a decode step of 16 sequences without a budget, to stock's", "≤ 1.02", f"{ratio('no budget', 128):.3f}"),
        ("the same of two stock engines", "", f"{ratio('stock again', 128):.3f}"),
        (f"a decode step of 16 sequences cut from {compared} to 128, to stock's at 128", "≤ 1.15",
         f"{ratio('eviction only', compared):.3f}"),
        (f"its growth from {lengths[0]} to {lengths[-1]}", "≤ 1.05", f"{growth:.3f}"),
    ]  # fmt: skip


def _compaction(found: list[Row]) -> list[tuple[str, str, str]]:
    longest = max(row["length"] for row in found)
    goals = {"snapkv": "≤ 10 %", "h2o": "≤ 25 %", "streaming_llm": ""}
    return [
        (f"scoring, compaction and offload of {longest} tokens, {policy}, to their prefill", goal,
         f"{_median(found, 'share', length=longest, policy=policy):.1%}")
        for policy, goal in goals.items()
    ]  # fmt: skip


def _pool(found: Row) -> list[tuple[str, str, str]]:
    case = found["case"]
    what = f"pool of four full sequences, {case['requests']} requests of {case['input']}/{case['output']}: "
    running = found["running_while_others_wait"] / found["allowed"]
    return [
        (what + "running, to what the compressed sizes allow", "≥ 0.9", f"{running:.2f}"),
        (what + "preemptions", "0", str(found["preemptions"])),
        (what + "time, to the bound", "≤ 1.1", f"{found['to_bound']:.2f}"),
    ]


def _serve(found: list[Row]) -> list[tuple[str, str, str]]:
    paper = [row for row in found if row["name"] == "paper" and row["load"]["concurrency"] == 16]
    longer = [row for row in found if row["name"] == "without a budget"] or paper
    lines = []
    for rows, variant, other, goals in (
        (longer, "no budget", "stock", ("≥ 0.98", "≤ 1.02")),
        (paper, "CaliDrop .7/.85", "eviction only", ("≥ 0.9", "")),
        (paper, "CaliDrop .7/.85, int8", "eviction only", ("", "")),
    ):
        if not any(row["variant"] == variant for row in rows):
            continue
        what = f"served, the paper's workload: {variant}, to {other}: "
        for figure, name, goal in (("output tokens/s", "output_throughput", goals[0]),
                                   ("processor time", "processor_seconds", ""),
                                   ("TPOT", "p50_tpot_ms", goals[1])):  # fmt: skip
            fastest = _fastest(rows, variant)[name] / _fastest(rows, other)[name]
            lines.append((what + figure, goal, f"{_paired(rows, variant, other, name):.2f} ({fastest:.2f})"))
    return lines


def _memory(found: Row) -> list[tuple[str, str, str]]:
    what = f"rise of PSS, {found['sequences']} sequences of {found['length']} evicted to 128, to what is accounted"
    return [(what, "0.9 to 1.1", f"{found['rise_to_accounted']:.2f}")]


def _paired(rows: list[Row], variant: str, other: str, name: str) -> float:
    """Median over the repeats of one variant's figure to another's of the same repeat."""
    theirs = {row["repeat"]: row[name] for row in rows if row["variant"] == other}
    return statistics.median(row[name] / theirs[row["repeat"]] for row in rows if row["variant"] == variant)


def _fastest(rows: list[Row], variant: str) -> Row:
    """A variant's repeat of most output tokens/s: what others do on the machine only makes one slower."""
    return max((row for row in rows if row["variant"] == variant), key=lambda row: float(row["output_throughput"]))


def _median(rows: list[Row], name: str, **where: Any) -> float:
    return statistics.median(row[name] for row in rows if all(row[key] == value for key, value in where.items()))


if __name__ == "__main__":
    sys.exit(main())
