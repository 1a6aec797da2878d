"""What `server.model` of a configuration may be: a folder, a name that vLLM can load, or one of benchmarks.models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.models import CATALOGUE, path_of
from benchmarks.models.fetch import SOURCE_FILE


def folder_of(model: str) -> str:
    """The folder of a model of the catalogue, which is fetched when it is not in the cache; any other name as it is."""
    return str(path_of(model)) if model in CATALOGUE else model


def serve_arguments(model: str) -> list[str]:
    """What `vllm serve` is told: a model of the catalogue keeps its name, so that results do not depend on folders."""
    return [folder_of(model), "--served-model-name", model] if model in CATALOGUE else [model]


def source_of(model: str) -> dict[str, Any] | None:
    """Where a model of the catalogue is from, with its licence; None for other models."""
    return json.loads((Path(folder_of(model)) / SOURCE_FILE).read_text()) if model in CATALOGUE else None
