"""Who wants to know that a request was refused: the server's metrics. Without a server nobody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Reason = Literal["invalid", "limit", "never_fits", "swap_full", "recall_full"]
REASONS: tuple[Reason, ...] = get_args(Reason)

_listeners: list[Callable[[Reason], None]] = []


def listen(listener: Callable[[Reason], None]) -> None:
    """From now on `listener` is called with the reason of every request that this process refuses."""
    _listeners.append(listener)


def refused(reason: Reason) -> None:
    for listener in _listeners:
        listener(reason)
