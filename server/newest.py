"""The newest statistics that any API process has read: two processes must not show a total that goes back.

They meet in the folder that vLLM makes for the metrics of several API processes. With one process there is none, and
nothing to share.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

EngineStats = dict[str, Any]


class Newest:
    """Statistics by engine, each the one of the highest `read` number, which the engine gives out."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._file = Path(folder) / "calidrop_engines.json" if folder else None
        self._own: list[EngineStats] = []

    def put(self, engines: list[EngineStats]) -> None:
        self._own = [{name: value for name, value in engine.items() if name != "sequences"} for engine in engines]
        if self._file is None:
            return
        with self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            written = self._file.with_suffix(".new")
            written.write_text(json.dumps(newest(self._own, self._shared())))
            written.replace(self._file)

    def get(self) -> list[EngineStats]:
        return newest(self._own, self._shared())

    def _shared(self) -> list[EngineStats]:
        if self._file is None or not self._file.exists():
            return []
        shared: list[EngineStats] = json.loads(self._file.read_text())
        return shared


def newest(*readings: list[EngineStats]) -> list[EngineStats]:
    """Each engine's reading with the highest number, in the order of the engines."""
    found: dict[int, EngineStats] = {}
    for reading in readings:
        for engine in reading:
            rank = engine["engine"]
            if rank not in found or engine["read"] > found[rank]["read"]:
                found[rank] = engine
    return [found[rank] for rank in sorted(found)]
