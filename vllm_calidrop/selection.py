"""Is CaliDrop the attention backend of an engine? Asked in every process, so it imports nothing."""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "CALIDROP"


def is_selected(vllm_config: Any) -> bool:
    """True when `--attention-backend calidrop` was given. By name: the enum member may not be registered here yet."""
    return getattr(vllm_config.attention_config.backend, "name", None) == BACKEND_NAME
