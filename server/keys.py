"""Who may use which route: vLLM's API keys for reading, the admin key for changing."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from fastapi import HTTPException, Request
from vllm import envs


class Keys:
    """The keys of one server, as digests. vLLM's own check guards only its own prefixes, so it is made here again."""

    def __init__(self, args: Any, admin_key: str) -> None:
        given = args.api_key or [envs.VLLM_API_KEY]
        self._readers = [_digest(key) for key in given if key]
        self._admin = _digest(admin_key) if admin_key else None

    @property
    def has_admin(self) -> bool:
        return self._admin is not None

    def may_read(self, request: Request) -> bool:
        return not self._readers or self._given(request, [*self._readers, *([self._admin] if self._admin else [])])

    def may_change(self, request: Request) -> bool:
        return self._admin is not None and self._given(request, [self._admin])

    def _given(self, request: Request, known: list[bytes]) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(key)
        found = False
        for other in known:
            found |= secrets.compare_digest(digest, other)
        return found and scheme.lower() == "bearer"


def reader(request: Request) -> None:
    """Dependency of routes that show something: the API key, where the server has one."""
    if not request.app.state.calidrop_keys.may_read(request):
        raise _unauthorized("This route needs the server's API key")


def admin(request: Request) -> None:
    """Dependency of routes that change something: the admin key, without which the server changes nothing."""
    keys: Keys = request.app.state.calidrop_keys
    if not keys.has_admin:
        raise HTTPException(403, "This server has no admin key (CALIDROP_ADMIN_KEY), so it cannot be changed")
    if not keys.may_change(request):
        raise _unauthorized("This route needs the admin key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized(message: str) -> HTTPException:
    return HTTPException(401, f"{message}: Authorization: Bearer KEY")
