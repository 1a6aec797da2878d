"""One run: full KV answers a prompt, then every row is fed that answer; prompt by prompt, stored as it comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.store import Store, read
from benchmarks.fidelity.asking import Answer, Asker, FidelityError, Question
from benchmarks.fidelity.prompts import Prompt
from benchmarks.fidelity.rows import Rows

FULL = "full KV"
Record = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What a stored answer depends on beside its prompt and its row."""

    model: str
    fingerprint: str
    dtype: str
    steps: int


def key_of(setup: Setup, prompt: Prompt, fields: dict[str, Any] | None) -> str:
    """Identity of one answer: `fields` is None for full KV's own."""
    parts = [setup.model, setup.fingerprint, setup.dtype, setup.steps, prompt.token_ids, fields]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def execute(
    setup: Setup,
    rows: Rows,
    prompts: Sequence[Prompt],
    asker: Callable[[], Asker],
    folder: Path,
    after: Callable[[int], None],
) -> None:
    """Asks what is not in `folder`/results.jsonl yet. `asker` is called when there is something to ask; `after` gets
    the number of prompts that are complete, whenever one more is.
    """
    path = folder / "results.jsonl"
    stored = {record["key"]: record for record in read(path)}
    with Store(path) as store:
        ask: Asker | None = None
        for number, prompt in enumerate(prompts, start=1):
            wanted = {row.label: rows.fields(row, len(prompt.token_ids)) for row in rows.row}
            missing = {label: fields for label, fields in wanted.items() if key_of(setup, prompt, fields) not in stored}
            full_key = key_of(setup, prompt, None)
            if full_key in stored and not missing:
                continue
            ask = ask or asker()
            if full_key not in stored:
                answer = ask.ask([Question(prompt.token_ids, {}, setup.steps)])[0]
                record = _full_record(full_key, prompt, answer)
                store.append(record)
                stored[full_key] = record
            full = stored[full_key]
            questions = [Question(prompt.token_ids, fields, setup.steps, full["tokens"]) for fields in missing.values()]
            for (label, fields), answer in zip(missing.items(), ask.ask(questions)):
                record = _row_record(key_of(setup, prompt, fields), prompt, label, fields, full, answer)
                store.append(record)
                stored[record["key"]] = record
            after(number)


def _full_record(key: str, prompt: Prompt, answer: Answer) -> Record:
    return {
        "key": key,
        "row": FULL,
        "prompt": prompt.id,
        "tokens": answer.tokens,
        "logprobs": _pairs(answer.logprobs),
    }


def _row_record(key: str, prompt: Prompt, label: str, fields: dict[str, Any], full: Record, answer: Answer) -> Record:
    if answer.tokens != full["tokens"]:
        raise FidelityError(f"{prompt.id}, {label}: the answer is not the forced one; is the logits processor loaded?")
    report = answer.report
    if report is None:
        raise FidelityError(f"{prompt.id}, {label}: the server sent no `calidrop` report, so nothing was evicted")
    if report["evicted"] and (report["mode"] == "full" or (report["reason"] and fields.get("kv_calibration", True))):
        raise FidelityError(
            f"{prompt.id}, {label}: not served as asked (mode {report['mode']}, reason {report['reason']}); give the "
            "engine larger pools"
        )
    names = ("evicted", "bytes_read", "pages_read", "group_reads", "mode", "reason")
    return {
        "key": key,
        "row": label,
        "prompt": prompt.id,
        "kind": prompt.kind,
        "prompt_tokens": len(prompt.token_ids),
        "fields": fields,
        "logprobs": _pairs(answer.logprobs),
        "report": {name: report.get(name) for name in names},
    }


def _pairs(steps: Sequence[dict[int, float]]) -> list[list[list[float]]]:
    """As JSON can hold them: per step pairs of a token and its log-probability."""
    return [[[token, value] for token, value in step.items()] for step in steps]
