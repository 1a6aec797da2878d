"""What compaction costs: time to score, compact and offload a prompt, as a part of its prefill in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from benchmarks.throughput.engine import Engine, random_prompt
from benchmarks.throughput.timing import load, now

POLICIES = ("streaming_llm", "snapkv", "h2o")
BUDGET = 128


def measure(model: str, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """One sequence at a time, calibration on, prefix caching off."""
    engine = Engine(model, "calidrop", max(lengths) + 64, enable_prefix_caching=False)
    rows = []
    try:
        engine.submit([random_prompt(512)], 1, {"kv_budget": BUDGET})
        engine.finish()
        for length in lengths:
            for policy in POLICIES:
                rows += [_one(engine, model, length, policy, seed) for seed in range(repeats)]
    finally:
        engine.close()
    return rows


def _one(engine: Engine, model: str, length: int, policy: str, seed: int) -> dict[str, Any]:
    with _stopwatch() as seconds:
        engine.submit([random_prompt(length, seed)], 1, {"kv_budget": BUDGET, "kv_policy": policy})
        prefill = engine.prefill()
        engine.finish()
    ours = sum(seconds.values())
    return {
        "model": model,
        "length": length,
        "policy": policy,
        "load": load(),
        "prefill_seconds": prefill - ours,
        "observe_seconds": seconds["observe_chunk"],
        "compact_seconds": seconds["compact"],
        "share": ours / (prefill - ours),
    }


@contextmanager
def _stopwatch() -> Iterator[dict[str, float]]:
    """Seconds spent in compaction's two entry points while the context is open."""
    from vllm_calidrop.attention import rows

    seconds = {"observe_chunk": 0.0, "compact": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[name] += now() - started

        return run

    originals = {name: getattr(rows, name) for name in seconds}
    for name, call in originals.items():
        setattr(rows, name, timed(name, call))
    try:
        yield seconds
    finally:
        for name, call in originals.items():
            setattr(rows, name, call)
