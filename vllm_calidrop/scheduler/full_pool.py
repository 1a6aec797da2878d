"""Requests for which the pools have no room and that take nothing less (`kv_on_full`: `wait`, `reject`).

Such a request stays at the head of vLLM's queue, as one does that finds no KV blocks: nobody overtakes it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_calidrop.scheduler.totals import Totals


@dataclass(frozen=True)
class Refusal:
    """reason: what was full (`swap_full`, `recall_full`), or `never_fits`: even empty pools are too small."""

    request_id: str
    reason: str
    prompt_tokens: int


class FullPool:
    """Who waits and who is refused; decided when a request is at the head of the queue."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._waiting: set[str] = set()
        self._refused: dict[str, Refusal] = {}

    def hold(self, request: Request, lacking: str, reject: bool, could_fit: bool) -> None:
        """The pools lack room. A request that has answered already is not refused any more: it waits."""
        request_id = request.request_id
        if not could_fit or (reject and request.num_preemptions == 0):
            reason = lacking if could_fit else "never_fits"
            self._refused[request_id] = Refusal(request_id, reason, request.num_prompt_tokens)
        elif request_id not in self._waiting:
            self._waiting.add(request_id)
            self._totals.swap_waits += 1

    def is_refused(self, request: Request) -> bool:
        return request.request_id in self._refused

    def take_refused(self) -> list[Refusal]:
        """Those to be ended now, each once."""
        refused = list(self._refused.values())
        self._refused.clear()
        return refused

    def forget(self, alive: Container[str]) -> None:
        """Drop what is known of requests that vLLM no longer knows."""
        self._waiting = {request_id for request_id in self._waiting if request_id in alive}
