"""One run: every sample in every cell, prompt by prompt, so that the cells always share their prompts."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy import cache
from benchmarks.accuracy.cells import Cell, cells_of
from benchmarks.accuracy.client import Endpoint, Reply, drive, request_body
from benchmarks.accuracy.config import Config
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.models import folder_of
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.store import Store, key_of
from benchmarks.accuracy.tasks import samples_of
from benchmarks.accuracy.tokens import Tokens
from benchmarks.models import CATALOGUE


@dataclass(frozen=True)
class Ask:
    key: str
    sample: Sample
    cell: Cell
    body: dict[str, Any]


def plan(config: Config, samples: list[Sample], model: str) -> Iterator[Ask]:
    """All cells of a prompt before the next prompt: the server's prefix cache helps, and a cut run stays fair."""
    cells = cells_of(config.sweep)
    for sample in samples:
        for cell in cells:
            body = request_body(sample, cell.fields, model, config.client)
            yield Ask(key_of({"sample": sample.id, **body}), sample, cell, body)


def samples_for(config: Config, tokenizer: str | None, limit: int | None) -> list[Sample]:
    """`limit`: the first samples of each task and length only. Prompts that a tokenizer was needed for are made once
    and kept in the user's cache folder.
    """
    tasks = config.tasks
    if limit is not None:
        tasks = [entry.model_copy(update={"count": min(entry.count, limit)}) for entry in tasks]
    place = folder_of(tokenizer) if tokenizer else None
    kept = cache.path_for(tasks, place)
    if kept is None:
        return samples_of(tasks, Tokens(place))
    if not kept.exists():
        cache.write(kept, samples_of(tasks, Tokens(place)))
    return cache.load(kept)


def fingerprint(model: str) -> str | None:
    """Hash of a local model's weights (large files: their size and time), so that a resumed run is one model's. Of a
    model of the catalogue: of the hashes that its packages are pinned by."""
    if model in CATALOGUE:
        pins = " ".join(package.sha256 for package in CATALOGUE[model].packages)
        return hashlib.sha256(pins.encode()).hexdigest()[:16]
    folder = Path(model)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        small = stat.st_size < 1 << 28
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


async def execute(config: Config, samples: list[Sample], base_url: str, folder: Path, model: str | None) -> list[str]:
    """Asks what is not yet stored in `folder`/results.jsonl; returns what failed for good, one line each."""
    endpoint = Endpoint(base_url, config.client, model)
    failures: list[str] = []
    start = time.monotonic()
    deadline = start + 60 * config.max_minutes if config.max_minutes else None
    try:
        name = await endpoint.model()
        with Store(folder / "results.jsonl") as store:
            asks = list(plan(config, samples, name))
            todo = [(ask, ask.body) for ask in asks if ask.key not in store.done]
            every = 0.2 if sys.stderr.isatty() else 20.0  # seconds: a log is not a terminal
            done = len(asks) - len(todo)
            with tqdm(total=len(asks), initial=done, unit="req", smoothing=0.05, mininterval=every) as progress:

                def keep(ask: Ask, reply: Reply) -> None:
                    store.append(record_of(ask, reply))
                    progress.update()

                def fail(ask: Ask, error: Exception) -> None:
                    failures.append(f"{ask.sample.id} in {ask.cell.id}: {error}")
                    progress.update()

                left = await drive(endpoint, todo, keep, fail, deadline)
    finally:
        await endpoint.close()
    _note(folder / "runs.jsonl", len(todo) - left - len(failures), left, len(failures), time.monotonic() - start)
    return failures


def record_of(ask: Ask, reply: Reply) -> dict[str, Any]:
    """One line of results.jsonl: the score and everything it was bought with."""
    sample = ask.sample
    return {
        "key": ask.key,
        "cell": ask.cell.id,
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "score": score(reply.text, sample),
        "text": reply.text,
        "answers": sample.answers,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "seconds": reply.seconds,
        "attempts": reply.attempts,
        "meta": sample.meta,
        "report": reply.report,
    }


def _note(path: Path, asked: int, left: int, failed: int, seconds: float) -> None:
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": asked,
        "left": left,
        "failed": failed,
        "seconds": round(seconds, 1),
    }
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
