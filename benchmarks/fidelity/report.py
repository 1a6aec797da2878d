"""report.md and its picture: every row beside what it reads and what it keeps on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.intervals import LEAST


def write(summary: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """`about`: what a reader must know of the run beside the figures (run.json)."""
    parts = [f"# Fidelity to full KV: {about['title']}, {about['length']} tokens", _setting(summary, about)]
    if not summary["rows"]:
        parts.append("No prompt is complete yet.")
    else:
        parts += [
            _table(summary),
            "## The worst step of each row",
            _worst(summary),
            "## By prompt",
            _by_prompt(summary),
        ]
        _draw(summary, about, folder / "fidelity.png")
        parts.append("![Divergence against what is read](fidelity.png)")
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


def _draw(summary: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in summary["rows"]:
        x, y = row["read_share"], max(row["kl"], 1e-6)
        axes.plot(x, y, "o")
        if row["kl_interval"]:
            axes.plot([x, x], [max(bound, 1e-6) for bound in row["kl_interval"]], color=axes.lines[-1].get_color())
        axes.annotate(row["label"], (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlim(left=-2e-4)
    axes.set_yscale("log")
    axes.set_xlabel("evicted KV read per step, share of its bytes")
    axes.set_ylabel("KL(full KV || row), nats")
    axes.set_title(f"{about['title']}, {about['length']} tokens, {len(summary['prompts'])} prompts", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
