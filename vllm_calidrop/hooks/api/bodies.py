"""Mistakes in the body of a request that no list of names shows, each told as a 400 that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_calidrop.settings.request import is_ours

CLIENT_ARGUMENT = "extra_body"


def misplaced_settings(body: Mapping[str, Any]) -> str | None:
    """What to say where our names were sent inside a literal `extra_body`; None where they were not.

    `extra_body` is an argument of OpenAI's Python client, which sends its content as top-level fields. vLLM would
    ignore a field of that name, and the request would silently keep full KV.
    """
    inside = body.get(CLIENT_ARGUMENT)
    if not isinstance(inside, Mapping):
        return None
    xargs = inside.get("vllm_xargs")
    names = [str(name) for part in (inside, xargs) if isinstance(part, Mapping) for name in part if is_ours(str(name))]
    if not names:
        return None
    return (
        f"{CLIENT_ARGUMENT} is an argument of OpenAI's Python client, not a field of the request: "
        f"send {', '.join(names)} as top-level fields of the JSON body"
    )


def field_with_a_lone_surrogate(body: Mapping[str, Any]) -> str | None:
    """The top-level field whose text holds half of a surrogate pair, which is no Unicode text and has no tokens."""
    return next((name for name, value in body.items() if _has_lone_surrogate(name) or _has_lone_surrogate(value)), None)


def _has_lone_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, Mapping):
        return any(_has_lone_surrogate(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(_has_lone_surrogate(part) for part in value if not isinstance(part, int))
    return False
