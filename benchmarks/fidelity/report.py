"""report.md and its picture: every row beside what it reads and what it keeps on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.intervals import LEAST

# Rows nearer to full KV than this are equal to it up to rounding, and are not drawn.
SAME = 1e-6
# The part of the evicted KV that a step may read, for a row to be named in the summary in words.
CHEAP = 0.05


def write(summary: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """`about`: what a reader must know of the run beside the figures (run.json)."""
    parts = [f"# Fidelity to full KV: {about['title']}, {about['length']} tokens", _setting(summary, about)]
    if not summary["rows"]:
        parts.append("No prompt is complete yet.")
    else:
        parts += [
            _table(summary),
            _in_words(summary),
            "## The worst step of each row",
            _worst(summary),
            "## By prompt",
            _by_prompt(summary),
        ]
        _draw(summary, about, folder / "fidelity.png")
        parts.append("![Divergence by row](fidelity.png)")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _setting(summary: dict[str, Any], about: dict[str, Any]) -> str:
    tokens = summary["prompt_tokens"] or [0]
    lines = [
        f"{about['weights']}, served in {summary['dtype']} with {about['versions']}. {about['command']}",
        f"{len(summary['prompts'])} of {summary['asked_prompts']} prompts of the split `{about['split']}`, "
        f"{min(tokens)} to {max(tokens)} tokens, the same in every row; {summary['policy']}, {summary['budget']} "
        "tokens kept per KV head. Full KV's own greedy answer, at most "
        f"{summary['steps']} tokens, is fed to every row; its first token comes from prefill and is not counted.",
        "KL is KL(full KV || row) of the next token in nats, the mean over steps and then over prompts. Its bins are "
        "the tokens that are among the 20 likeliest of both and the rest, so it is a lower bound. In brackets: 95 % "
        f"bootstrap interval over prompts, none below {LEAST} of them. Top-1: share of the steps at which both find "
        "the same token likeliest. Read: bytes of evicted KV read again, of all of them, per step. Memory: codes, "
        "scales and page buffer on the device, of the evicted tokens' K and V in bfloat16.",
    ]
    return "\n\n".join(lines)


def _table(summary: dict[str, Any]) -> str:
    head = ["row", "KL [95 %]", "median over prompts", "top-1", "read per step", "MB read per answer", "memory"]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for row in summary["rows"]:
        bounds = row["kl_interval"]
        kl = _number(row["kl"]) + (f" [{_number(bounds[0])}, {_number(bounds[1])}]" if bounds else "")
        memory = "" if not row["device_share"] else f"{100 * row['device_share']:.1f} %"
        if row["kept_share"]:
            memory = f"{100 * row['kept_share']:.1f} % (kept tokens)"
        cells = [row["label"], kl, _number(row["kl_median"]), f"{row['agreement']:.3f}"]
        cells += [f"{row['read_share']:.4f}", f"{row['megabytes_read']:.1f}", memory]
        lines.append(_line(cells))
    return "\n".join(lines)


def _worst(summary: dict[str, Any]) -> str:
    lines = [_line(["row", "KL", "prompt", "step", "full KV's likeliest", "the row's likeliest"]), _line(["---"] * 6)]
    for row in summary["rows"]:
        worst = row["worst"]
        texts = [f"`{worst[name]!r}`".replace("|", "\\|") for name in ("full", "row")]
        lines.append(_line([row["label"], _number(worst["kl"]), worst["prompt"], str(worst["step"]), *texts]))
    return "\n".join(lines)


def _by_prompt(summary: dict[str, Any]) -> str:
    labels = [row["label"] for row in summary["rows"]]
    lines = [_line(["prompt", *labels]), _line(["---"] + ["---:"] * len(labels))]
    for prompt in summary["prompts"]:
        lines.append(_line([prompt, *(_number(row["kl_by_prompt"][prompt]) for row in summary["rows"])]))
    return "\n".join(lines)


def _in_words(summary: dict[str, Any]) -> str:
    """Which row is nearest to full KV among those that read little."""
    cheap = [row for row in summary["rows"] if row["read_share"] <= CHEAP]
    if not cheap:
        return f"No row reads at most {100 * CHEAP:g} % of the evicted KV per step."
    best = min(cheap, key=lambda row: row["kl"])
    bounds = best["kl_interval"]
    within = f" (95 % interval {_number(bounds[0])} to {_number(bounds[1])})" if bounds else ""
    memory = best["device_share"] or best["kept_share"]
    return (
        f"On this model and these prompts, of the rows that read at most {100 * CHEAP:g} % of the evicted KV per step, "
        f"`{best['label']}` is nearest to full KV: its KL is {_number(best['kl'])}{within} and it agrees in "
        f"{100 * best['agreement']:.1f} % of the steps, reading {100 * best['read_share']:.2f} % per step with "
        f"{100 * memory:.1f} % of the evicted KV's memory on the device."
    )


def _draw(summary: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    """A line per row: its divergence, the interval where there is one, and what it reads and keeps in words."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in summary["rows"] if row["kl"] > SAME]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.36 * len(rows)))
    for place, row in enumerate(reversed(rows)):
        bounds = row["kl_interval"] or (row["kl"], row["kl"])
        axes.plot([max(bound, SAME) for bound in bounds], [place, place], color="#0072b2", linewidth=1.5)
        axes.plot(row["kl"], place, "o", color="#0072b2")
        memory = row["device_share"] or row["kept_share"]
        text = f"read {100 * row['read_share']:.2g} %, memory {100 * memory:.3g} %"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("KL(full KV || row) of the next token, nats")
    axes.set_title(f"{about['title']}, {about['length']} tokens, {len(summary['prompts'])} prompts", fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
