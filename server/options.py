"""The server's own options. They are environment variables: vLLM starts API processes that see no flag of ours."""

from __future__ import annotations

import os
from dataclasses import dataclass

ADMIN_KEY = "CALIDROP_ADMIN_KEY"
MAX_BODY_BYTES = "CALIDROP_MAX_BODY_BYTES"
REFRESH_SECONDS = "CALIDROP_REFRESH_SECONDS"


@dataclass(frozen=True)
class Options:
    """admin_key: empty for none. refresh_seconds: how often an API process reads its engines."""

    admin_key: str
    max_body_bytes: int
    refresh_seconds: float

    @classmethod
    def from_environment(cls) -> Options:
        """ValueError names the variable."""
        return cls(
            admin_key=os.environ.get(ADMIN_KEY, ""),
            max_body_bytes=int(_positive(MAX_BODY_BYTES, 64 * 2**20)),
            refresh_seconds=_positive(REFRESH_SECONDS, 2.0),
        )


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {text!r}")
    return value
