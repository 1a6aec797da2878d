"""results.json as tables (report.md) and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MIB = 2**20
CALIDROP = "CaliDrop .7/.85"
# Asked of a pool of four and of an ample one.
POOL_LOAD = {"input": 960, "output": 128, "concurrency": 16, "prompts": 16, "shared": 0, "spread": 1.0}


def write(results: dict[str, Any], folder: Path) -> Path:
    machine = ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items())
    parts = ["# Throughput: one run, side by side", f"{machine}. Ratios are what counts; times are this machine's."]
    sections: tuple[tuple[str, Callable[[Any], list[str]]], ...] = (
        ("ops", _ops), ("steps", _steps), ("profile", _profile), ("compaction", _compaction), ("pool", _pool),
        ("memory", _memory),
    )  # fmt: skip
    for name, section in sections:
        if name in results:
            parts += section(results[name])
    if "serve" in results:
        parts += _serve(results["serve"])
        parts += [f"![{caption}]({name})" for caption, name in _pictures(results["serve"], folder)]
    runs = [
        [part, r["profile"], r["seconds"], f"{r['load_at_end']:.1f}"] for part, r in results.get("runs", {}).items()
    ]
    parts += ["## The run", _table(["part", "profile", "seconds", "load average at its end"], runs)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(figures: dict[str, float]) -> str:
    return f"{figures['median']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})"


def _ops(found: dict[str, Any]) -> list[str]:
    head = [
        "dtype, layout",
        "heads",
        "head_dim",
        "kept",
        "block",
        "stock ms",
        "native ms",
        "torch ms",
        "native / stock",
    ]
    rows = [
        [
            f"{r['case']['dtype']}, {r['isa']}", f"{r['case']['query_heads']}/{r['case']['kv_heads']}",
            r["case"]["head_dim"], r["case"]["kept"], r["case"]["block_size"],
            *(f"{r['best_ms_per_layer'][name]:.3f}" for name in ("stock", "native", "torch")),
            _ratio(r["native_to_stock"]),
        ]
        for r in found["operators"]
    ]  # fmt: skip
    reload = [
        [r["case"]["stored"], r["case"]["codec"], r["case"]["dtype"], r["case"]["head_dim"], f"{r['gib']:.3f}",
         *(f"{r['best_seconds_per_gib'][n]:.3f}" for n in ("reload", "read")),
         _ratio(r["reload_to_read"])]
        for r in found["reload"]
    ]  # fmt: skip
    looks = [
        [r["case"]["stored"], f"{r['case']['query_heads']}/{r['case']['kv_heads']}", r["case"]["head_dim"],
         *(f"{r['best_ms_per_layer'][n]:.3f}" for n in ("native", "torch", "kept", "read all")),
         *(_ratio(r[n]) for n in ("torch_to_native", "native_to_kept", "native_to_read_all"))]
        for r in found.get("looks", [])
    ]  # fmt: skip
    return [
        "## The decode operator, one layer of 16 rows (ms per layer; median ratio and quartiles)", _table(head, rows),
        "## Reading evicted KV again (16 rows, all groups): s per GiB of KV without a codec, against a plain sum",
        _table(["evicted tokens", "codec", "dtype", "head_dim", "GiB", "reload", "plain read", "reload / read"],
               reload),
        "## A look of recall by pages, one layer of 16 rows, all groups look (ms per layer)",
        _table(["evicted tokens", "heads", "head_dim", "native", "torch", "attention over 128 kept",
                "plain sum over the evicted KV", "torch / native", "native / kept", "native / plain sum"], looks),
    ]  # fmt: skip


def _compaction(found: list[Row]) -> list[str]:
    rows = [
        [length, policy, f"{_median(some, 'prefill_seconds'):.2f}", f"{_median(some, 'observe_seconds'):.3f}",
         f"{_median(some, 'compact_seconds'):.3f}", f"{_median(some, 'share'):.1%}"]
        for (length, policy), some in _grouped(found, lambda r: (r["length"], r["policy"]))
    ]  # fmt: skip
    head = ["prompt", "policy", "prefill s", "scored in prefill s", "compaction and offload s", "part of prefill"]
    return ["## Scoring, compaction and offload, as a part of the prefill", _table(head, rows)]


def _steps(found: list[Row]) -> list[str]:
    rows = [
        [r["model"], r["case"], r["length"], f"{r['median_ms']['stock']:.1f}", f"{r['median_ms']['ours']:.1f}",
         _ratio(r["ours_to_stock"])]
        for r in found
    ]  # fmt: skip
    head = ["model", "case", "prompt", "stock ms, prompts of 128", "ours ms", "ours / stock"]
    return ["## A decode step of 16 sequences (budget 128; processor time)", _table(head, rows)]


def _profile(found: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(found.values())))
    rows = [[engine, *(f"{parts[name]:.2f}" for name in names)] for engine, parts in found.items()]
    return ["## Where a decode step's time goes (ms)", _table(["", *names], rows)]


def _pool(found: Row) -> list[str]:
    case = found["case"]
    rows = [
        ["stock: prefill of one prompt", f"{found['stock_prefill_seconds']:.2f} s"],
        ["stock: step of as many sequences as fit compressed", f"{found['stock_step_seconds'] * 1e3:.1f} ms"],
        ["the bound: all prefills, and all other tokens in such steps", f"{found['bound_seconds']:.1f} s"],
        ["eviction only", f"{found['seconds']:.1f} s in {found['steps']} steps, {found['to_bound']:.2f} of the bound"],
        ["sequences that fit compressed to the end", found["allowed"]],
        ["running: peak; mean while others wait",
         f"{found['running_peak']}; {found['running_while_others_wait']:.1f}"],
        ["preemptions", found["preemptions"]],
        ["peak KV blocks", f"{found['peak_blocks']} of {found['blocks']}"],
    ]  # fmt: skip
    sizes = f"{case['requests']} requests of {case['input']}/{case['output']}, {case['model']}"
    return [f"## A pool of four full sequences: {sizes} (processor time)", _table(["", ""], rows)]


def _memory(found: Row) -> list[str]:
    accounted = sum(found["accounted"].values())
    rows = [
        ["idle", f"{found['idle_pss'] / MIB:.0f}"],
        *([f"accounted: {name}", f"{size / MIB:.1f}"] for name, size in found["accounted"].items()),
        ["accounted in all", f"{accounted / MIB:.1f}"],
        ["rise of the peak", f"{found['rise'] / MIB:.1f} ({found['rise_to_accounted']:.3f} of what is accounted)"],
    ]
    title = f"{found['sequences']} sequences of {found['length']} evicted to 128, {found['model']}"
    return [f"## Memory: {title} (PSS in MiB; peak KV blocks {found['peak_kv_blocks']})", _table(["", "MiB"], rows)]


def _serve(found: list[Row]) -> list[str]:
    head = ["variant", "output tokens/s", "total tokens/s", "to stock", "processor time to stock", "TTFT p50/p95 ms",
            "TPOT p50/p95 ms", "ITL p50/p95 ms", "running", "peak KV blocks", "preemptions", "peak swap MiB",
            "recompute rate", "MiB read / token"]  # fmt: skip
    parts = []
    for (setup, name, load), some in _grouped(found, lambda r: (r["setup"], r["name"], tuple(r["load"].items()))):
        sizes = dict(load)
        title = f"{name}: {some[0]['model']}, {setup}, {sizes['input']}/{sizes['output']}"
        title += f", {sizes['prompts']} requests, {sizes['concurrency']} at a time"
        busy = statistics.mean(r["machine_load"] for r in some)
        rows = []
        for variant, own in _grouped(some, lambda r: r["variant"]):
            rows.append([
                variant, f"{_median(own, 'output_throughput'):.0f}", f"{_median(own, 'total_token_throughput'):.0f}",
                _to_stock(some, own, "output_throughput"), _to_stock(some, own, "processor_seconds"),
                *(_percentiles(own, name) for name in ("ttft", "tpot", "itl")),
                f"{max(r['running'] for r in own):.0f}", f"{max(r['kv_blocks'] for r in own):.0f}",
                f"{sum(r['preemptions'] for r in own):.0f}",
                _mib(max(r["swap_bytes"] for r in own)),
                *_rates(own),
            ])  # fmt: skip
        parts += [f"## {title} ({len({r['repeat'] for r in some})} repeats, load {busy:.1f})", _table(head, rows)]
    return parts


def _mib(size: float) -> str:
    """Empty for nothing, and where the server does not say."""
    return f"{size / MIB:.1f}" if size else ""


def _rates(rows: list[Row]) -> tuple[str, str]:
    """Recomputations among all decisions, and MiB of evicted KV read again per output token."""
    recomputes = sum(r["recomputes"] for r in rows)
    decisions = recomputes + sum(r["merges"] + r["plain"] for r in rows)
    if not decisions:
        return "", ""
    read = sum(r["bytes_read"] for r in rows) / sum(r["total_output_tokens"] for r in rows)
    return f"{recomputes / decisions:.1%}", f"{read / MIB:.3f}"


def _percentiles(rows: list[Row], name: str) -> str:
    return f"{_median(rows, f'p50_{name}_ms'):.1f} / {_median(rows, f'p95_{name}_ms'):.1f}"


def _to_stock(rows: list[Row], own: list[Row], name: str) -> str:
    """Median over the repeats of own / stock of the same repeat."""
    stock = {r["repeat"]: r[name] for r in rows if r["variant"] == "stock"}
    ratios = [r[name] / stock[r["repeat"]] for r in own if stock.get(r["repeat"])]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _median(rows: list[Row], name: str) -> float:
    return statistics.median(r[name] for r in rows)


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _pictures(rows: list[Row], folder: Path) -> list[tuple[str, str]]:
    """Total tokens/s by concurrency (the paper's Fig. 3a), by pool, by input length, by calibration size (Fig. 3c)."""
    axes: list[tuple[str, str, Callable[[Row], bool], Callable[[Row], Any]]] = [
        ("concurrency", "requests at a time", lambda r: r["name"] == "paper", lambda r: r["load"]["concurrency"]),
        ("inputs", "input tokens", lambda r: r["name"] == "inputs", lambda r: r["load"]["input"]),
        ("pools", "the KV pool", _is_pool_load, lambda r: r["setup"]),
        (
            "calibration", "evicted tokens kept on the host",
            lambda r: r["name"] == "paper" and r["load"]["concurrency"] == 16 and r["variant"].startswith(CALIDROP),
            lambda r: int(r["variant"].removeprefix(CALIDROP).split()[1]) if "tokens" in r["variant"] else 832,
        ),
    ]  # fmt: skip
    drawn = []
    for stem, label, wanted, x in axes:
        some = [r for r in rows if wanted(r)]
        if len({x(r) for r in some}) < 2:
            continue
        name = f"{stem}.png"
        if stem == "calibration":
            some = [{**r, "variant": CALIDROP} for r in some]
        _draw(some, x, label, folder / name)
        drawn.append((f"total tokens/s by {label}", name))
    return drawn


def _is_pool_load(row: Row) -> bool:
    return row["load"] == POOL_LOAD and row["name"] in ("paper", "pool")


def _draw(rows: list[Row], x: Callable[[Row], Any], label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for variant, own in _grouped(rows, lambda r: r["variant"]):
        points = sorted((at, _median(some, "total_token_throughput")) for at, some in _grouped(own, x))
        axes.plot([str(at) for at, _ in points], [value for _, value in points], marker="o", label=variant)
    axes.set(xlabel=label, ylabel="total tokens/s", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
