"""Decode steps of 16 sequences: compacted ones against vLLM's own backend with prompts as short as what is kept.

The engines live in this process and take turns step by step.
"""

from __future__ import annotations

from typing import Any

from benchmarks.throughput.engine import Engine, random_prompt
from benchmarks.throughput.timing import load, now, ratio

SEQUENCES, BUDGET = 16, 128
DISTINCT = 512  # prompts up to this length differ from each other
EVICTION = {"kv_budget": BUDGET, "kv_calibration": False}
CALIDROP = {"kv_budget": BUDGET, "kv_theta1": 0.7, "kv_theta2": 0.85}
PAGES = {"kv_budget": BUDGET, "kv_recall": "pages", "kv_recall_theta": 2.0}
RECOMPUTE = {"kv_budget": BUDGET, "kv_theta1": 2.0, "kv_theta2": 2.0}


def measure(model: str, lengths: list[int], steps: int) -> list[dict[str, Any]]:
    """Rows: no budget at the short length, then eviction only (and CaliDrop, and reading all again) at each length."""
    # One window of outputs for all: kept lengths are the same in every row.
    stock, ours, again = (Engine(model, backend, max(lengths) + 1024) for backend in (None, "calidrop", None))
    cases: list[tuple[str, int, dict[str, Any]]] = [("no budget", BUDGET, {})]
    for length in lengths:
        cases += [("eviction only", length, EVICTION), ("calidrop .7/.85", length, CALIDROP)]
        cases.append(("calidrop .7/.85, int8", length, {**CALIDROP, "kv_codec": "int8"}))
        cases.append(("pages, a look every step", length, PAGES))
    cases.append(("recompute always", max(lengths), RECOMPUTE))
    cases.append(("recompute always, int8", max(lengths), {**RECOMPUTE, "kv_codec": "int8"}))
    rows = []
    try:
        # What two engines differ by that are the same: where in memory their weights happened to lie.
        rows.append({"model": model, "case": "stock again", "length": BUDGET, **_one(stock, again, BUDGET, {}, steps)})
        for name, length, settings in cases:
            rows.append({"model": model, "case": name, "length": length, **_one(stock, ours, length, settings, steps)})
    finally:
        for engine in (stock, ours, again):
            engine.close()
    return rows


def _one(stock: Engine, ours: Engine, length: int, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    tokens = 8 + steps
    _start(stock, BUDGET, {}, tokens)
    _start(ours, length, settings, tokens)
    for engine in (stock, ours):
        for _ in range(4):
            engine.step()
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for step in range(steps):  # who goes first changes, as a step finds the caches as the last one left them
        turns = [("stock", stock), ("ours", ours)]
        for name, engine in turns if step % 2 else turns[::-1]:
            seconds[name].append(engine.step())
    stock.abort_all()
    ours.abort_all()
    middle = {name: sorted(times)[len(times) // 2] * 1e3 for name, times in seconds.items()}
    return {"load": load(), "median_ms": middle, "ours_to_stock": ratio(seconds["ours"], seconds["stock"])}


def _start(engine: Engine, length: int, settings: dict[str, Any], tokens: int) -> None:
    """All sequences have their first token. Long prompts are equal: the first fills the prefix cache for the others,
    and what they keep is their own. Short ones differ, because equal ones would share the blocks that are measured."""
    prompts = [random_prompt(length, seed if length <= DISTINCT else 0) for seed in range(SEQUENCES)]
    engine.submit(prompts[:1], tokens + SEQUENCES * 8, settings)
    engine.prefill()
    engine.submit(prompts[1:], tokens + 64, settings)
    engine.prefill()


def profile(model: str, length: int, steps: int) -> dict[str, Any]:
    """Where a step's time goes, in ms: attention operators by name, the rest of the model, and outside of it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from vllm_calidrop.attention.cpu import CaliDropCpuImpl

    found: dict[str, Any] = {}
    engines = {name: Engine(model, backend, length + 1024) for name, backend in (("stock", None), ("ours", "calidrop"))}
    cases = [("stock", "stock", BUDGET, {}), ("eviction only", "ours", length, EVICTION)]
    try:
        for case, name, prompt, settings in cases:
            engine, spent = engines[name], {"attention": 0.0, "model": 0.0}
            attention = CPUAttentionBackendImpl if name == "stock" else CaliDropCpuImpl
            runner = engine.core.model_executor.driver_worker.worker.model_runner
            _start(engine, prompt, settings, steps + 8)
            with _timed(attention, "forward", spent, "attention"), _timed(runner, "execute_model", spent, "model"):
                whole = sum(engine.step() for _ in range(steps))
            engine.abort_all()
            parts = {part: seconds / steps * 1e3 for part, seconds in spent.items()}
            parts["rest of the model"] = parts.pop("model") - parts["attention"]
            parts["outside of it"] = whole / steps * 1e3 - sum(parts.values())
            found[case] = parts
    finally:
        for engine in engines.values():
            engine.close()
    return found


class _timed:
    """Adds the seconds of every call of `owner.name` to spent[key] while the context is open."""

    def __init__(self, owner: Any, name: str, spent: dict[str, float], key: str) -> None:
        self.owner, self.name, self.spent, self.key = owner, name, spent, key
        self.original = getattr(owner, name)

    def __enter__(self) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return self.original(*args, **kwargs)
            finally:
                self.spent[self.key] += now() - started

        setattr(self.owner, self.name, run)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.original)
