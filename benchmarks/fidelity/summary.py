"""From stored answers to figures by row: divergence with intervals over prompts, agreement, reads, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from benchmarks.fidelity.measure import divergence, likeliest
from benchmarks.fidelity.memory import device_share
from benchmarks.fidelity.prompts import Prompt
from benchmarks.fidelity.rows import Rows
from benchmarks.fidelity.run import Record, Setup, key_of
from benchmarks.intervals import interval


class Shape(NamedTuple):
    """The model's attention; `item_bytes` of the cache's dtype it was measured with."""

    layers: int
    kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def kv_bytes(self) -> int:
        """K and V of one token in all layers and KV heads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.item_bytes


def summarize(
    setup: Setup,
    rows: Rows,
    prompts: Sequence[Prompt],
    records: Sequence[Record],
    shape: Shape,
    decode: Callable[[int], str],
) -> Any:
    """Only prompts that every row has answered are counted, so that all rows share their prompts. `decode` is the text
    of a token."""
    stored = {record["key"]: record for record in records}
    full_keys = [key_of(setup, prompt, None) for prompt in prompts]
    keys = {
        row.label: [key_of(setup, prompt, rows.fields(row, len(prompt.token_ids))) for prompt in prompts]
        for row in rows.row
    }
    complete = [i for i in range(len(prompts)) if all(of_row[i] in stored for of_row in (full_keys, *keys.values()))]
    answers = [stored[full_keys[i]] for i in complete]
    return {
        "model": setup.model,
        "dtype": setup.dtype,
        "steps": setup.steps,
        "policy": rows.policy,
        "budget": rows.budget,
        "asked_prompts": len(prompts),
        "prompts": [prompts[i].id for i in complete],
        "prompt_tokens": [len(prompts[i].token_ids) for i in complete],
        "rows": [
            {"label": row.label, "settings": row.settings, "kept_share": row.kept_share}
            | _figures(answers, [stored[keys[row.label][i]] for i in complete], shape, decode)
            for row in rows.row
        ]
        if complete
        else [],
    }


class Comparison(NamedTuple):
    """One prompt's answer in one row. Per step: the divergence, whether the likeliest tokens agree, and the two."""

    divergences: list[float]
    agree: list[bool]
    likeliest: list[tuple[int, int]]


def compare(full: Record, row: Record) -> Comparison:
    """From the second step on: the first token comes from the prompt's own prefill, which is full attention."""
    steps = [
        (dict(map(tuple, of_full)), dict(map(tuple, of_row)))
        for of_full, of_row in zip(full["logprobs"][1:], row["logprobs"][1:], strict=True)
    ]
    tokens = [(likeliest(of_full), likeliest(of_row)) for of_full, of_row in steps]
    return Comparison([divergence(*step) for step in steps], [a == b for a, b in tokens], tokens)


def _figures(
    answers: Sequence[Record], records: Sequence[Record], shape: Shape, decode: Callable[[int], str]
) -> dict[str, Any]:
    compared = [compare(full, record) for full, record in zip(answers, records, strict=True)]
    means = [mean(each.divergences) for each in compared]
    at = max(range(len(compared)), key=lambda i: max(compared[i].divergences))
    step = max(range(len(compared[at].divergences)), key=lambda i: compared[at].divergences[i])
    of_full, of_row = compared[at].likeliest[step]
    reads, megabytes, memory = [], [], []
    for record, each in zip(records, compared):
        report = record["report"]
        whole = report["evicted"] * shape.kv_bytes * len(each.divergences)
        reads.append(report["bytes_read"] / whole if whole else 0.0)
        megabytes.append(report["bytes_read"] / 1e6)
        memory.append(device_share(record["fields"], report["evicted"], shape.head_dim, 2))
    return {
        "n": len(records),
        "kl": mean(means),
        "kl_interval": interval({"all": means}),
        "kl_median": median(means),
        "kl_by_prompt": {record["prompt"]: value for record, value in zip(records, means)},
        "agreement": mean(mean(each.agree) for each in compared),
        "read_share": mean(reads),
        "megabytes_read": mean(megabytes),
        "device_share": mean(memory),
        "worst": {
            "kl": compared[at].divergences[step],
            "prompt": records[at]["prompt"],
            "step": step + 1,
            "full": decode(of_full),
            "row": decode(of_row),
        },
    }
