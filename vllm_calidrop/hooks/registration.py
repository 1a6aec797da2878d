"""The name CALIDROP among vLLM's attention backends.

Kept apart and import-light: a spawned engine process unpickles VllmConfig, and with it the enum member, before plugins
are loaded. The member therefore unpickles by calling `backend_member`, which registers it first.
"""

from __future__ import annotations

from typing import Any

from vllm_calidrop.selection import BACKEND_NAME

BACKEND_PATH = "vllm_calidrop.attention.backend.CaliDropBackend"


def backend_member() -> Any:
    """The enum member, registered on first use."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        member = AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        # Enum members pickle by value, which an unregistered process would refuse.
        object.__setattr__(member, "__reduce_ex__", lambda _protocol: (backend_member, ()))
    return member
