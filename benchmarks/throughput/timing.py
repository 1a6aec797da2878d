"""Timing two or more things against each other on a machine whose speed drifts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# One thread does all the work of these measurements, so its processor time says what its wall clock would on a quiet
# machine, and other programs disturb it little.
now = time.thread_time


def interleaved(
    variants: Mapping[str, Callable[[], Any]], repeats: int, at_least: float = 0.005
) -> dict[str, list[float]]:
    """Seconds per call of every variant, in turns; a short one is called often enough to last `at_least` seconds."""
    calls = {}
    for name, call in variants.items():
        call()
        started = now()
        call()
        calls[name] = max(1, int(at_least / max(now() - started, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            started = now()
            for _ in range(calls[name]):
                call()
            seconds[name].append((now() - started) / calls[name])
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the ratios of neighbours in time, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "low": low, "high": high}


def load() -> float:
    """The machine's load average of the last minute: results say what else was running."""
    return os.getloadavg()[0]
