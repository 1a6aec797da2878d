"""Prompts and settings the engine tests go through, and the reference's answers to them."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.small_model.language import TASKS, WORD_ID, make
from tests.engine.harness import Ask
from tests.reference import Reference, Result

ROOT = Path(__file__).resolve().parents[2]
MODEL = os.environ.get("CALIDROP_TEST_MODEL", str(ROOT / "benchmarks" / "small_model" / "smooth"))

POLICIES = ("snapkv", "h2o", "streaming_llm")
BUDGETS = (32, 33, 64, 128)
GATES = ("group", "head", "group_mean")
CONTEXTS = (200, 517, 1000)
CALIBRATION: tuple[dict[str, Any], ...] = (
    {"kv_calibration": False},
    {"kv_theta1": 0.7, "kv_theta2": 0.85},
    {"kv_theta1": 0.8, "kv_theta2": 0.85},
    {"kv_theta1": 0.6, "kv_theta2": 0.8},
)
DIMENSIONS: tuple[Sequence[Any], ...] = (POLICIES, BUDGETS, CALIBRATION, GATES, CONTEXTS)


def prompt_of(length: int, seed: int) -> list[int]:
    """Token ids of a prompt of about `length` tokens in the small model's language; tasks take turns by seed."""
    sample = make(TASKS[seed % len(TASKS)], length, seed)
    return [WORD_ID[word] for word in sample.prompt.split()]


def ask_of(combination: Sequence[Any], seed: int, max_tokens: int = 20) -> Ask:
    policy, budget, calibration, gate, context = combination
    settings = {"kv_policy": policy, "kv_budget": budget, "kv_gate": gate, **calibration}
    return Ask(prompt_of(context, seed), max_tokens, settings)


def every_combination() -> list[tuple[Any, ...]]:
    return list(itertools.product(*DIMENSIONS))


def covering_combinations(seed: int = 0, dimensions: Sequence[Sequence[Any]] = DIMENSIONS) -> list[tuple[Any, ...]]:
    """Combinations that hold every pair of values of any two dimensions: greedy, the best of some random candidates."""
    rng = random.Random(seed)

    def pairs(indices: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(a, indices[a], b, indices[b]) for a, b in itertools.combinations(range(len(dimensions)), 2)}

    sizes = [range(len(values)) for values in dimensions]
    missing = set().union(*(pairs(indices) for indices in itertools.product(*sizes)))
    chosen = []
    while missing:
        candidates = [[rng.choice(size) for size in sizes] for _ in range(200)]
        best = max(candidates, key=lambda indices: len(pairs(indices) & missing))
        missing -= pairs(best)
        chosen.append(tuple(values[index] for values, index in zip(dimensions, best, strict=True)))
    return chosen


class CachedReference:
    """The reference on the tests' model; an answer is computed once per run."""

    def __init__(self) -> None:
        self._reference = Reference(MODEL)
        self._known: dict[str, Result] = {}

    def __call__(self, ask: Ask, resume_at: int | None = None) -> Result:
        key = json.dumps([ask.prompt, ask.max_tokens, ask.settings, resume_at])
        if key not in self._known:
            self._known[key] = self._reference.generate(
                ask.prompt, ask.max_tokens, ask.reference_settings, resume_at=resume_at
            )
        return self._known[key]
