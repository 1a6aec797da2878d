"""Finished prompts on disk: fitting a prompt to its length tokenizes it many times, and a run is started many times."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.samples import Sample

# Suites whose prompts follow from the configuration, the tokenizer, this folder's code and the files of their options.
SUITES = {"ruler", "niah"}
HERE = Path(__file__).parent


def path_for(tasks: Sequence[Tasks], tokenizer: str | None) -> Path | None:
    """Where these prompts lie or will lie; None where they are not worth keeping or follow from more than is known."""
    if tokenizer is None or any(entry.suite not in SUITES for entry in tasks):
        return None
    digest = hashlib.sha256(json.dumps([entry.model_dump() for entry in tasks], sort_keys=True).encode())
    for file in [*sorted(HERE.rglob("*.py")), *sorted((HERE / "data").iterdir()), Path(tokenizer) / "tokenizer.json"]:
        digest.update(file.read_bytes() if file.exists() else tokenizer.encode())
    for option in (value for entry in tasks for value in entry.options.values() if isinstance(value, str)):
        files = [Path(option)] if Path(option).is_file() else sorted(Path(option).rglob("*"))
        for file in files:
            digest.update(file.read_bytes() if file.is_file() else b"")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vllm_calidrop" / "prompts" / f"{digest.hexdigest()[:24]}.json"


def write(path: Path, samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False), encoding="utf-8")
    unfinished.rename(path)


def load(path: Path) -> list[Sample]:
    return [Sample(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
