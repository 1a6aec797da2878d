"""Documents and scoring of `small_retrieval`, for lm-evaluation-harness.

Beside the small model's language only what lm-eval brings: it may live in an environment of its own.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from benchmarks.small_model import language

TASKS = ("single", "multi_key", "follow_up")


def documents(**_: Any) -> DatasetDict:
    items = [language.make(task, 512, 20_000 + i) for i in range(20) for task in TASKS]
    rows = [{"prompt": item.prompt, "answer": item.answer.removesuffix(language.END).strip()} for item in items]
    return DatasetDict({"test": Dataset.from_list(rows)})


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    return {"exact": float(results[0].split() == doc["answer"].split())}
