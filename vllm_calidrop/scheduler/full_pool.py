"""Requests for which the pools have no room and that take nothing less (`kv_on_full`: `wait`, `reject`).

Such a request stays at the head of vLLM's queue, as one does that finds no KV blocks: nobody overtakes it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from vllm_calidrop.scheduler.admission import Decision

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_calidrop.scheduler.totals import Totals


class FullPool:
    """Who waits and who is refused; decided when a request is at the head of the queue."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._waiting: set[str] = set()
        self._refused: dict[str, Decision] = {}

    def hold(self, request: Request, decision: Decision) -> None:
        """The pools lack room. A request that has answered already is not refused any more: it waits."""
        request_id = request.request_id
        if decision.reason == "never_fits" or (decision.mode == "reject" and request.num_preemptions == 0):
            self._refused[request_id] = decision
        elif request_id not in self._waiting:
            self._waiting.add(request_id)
            self._totals.swap_waits += 1

    def is_refused(self, request: Request) -> bool:
        return request.request_id in self._refused

    def take_refused(self) -> dict[str, Decision]:
        """Those to be ended now by their request ids, each once. The reason is what was full (`swap_full`,
        `recall_full`), or `never_fits`: even empty pools are too small."""
        refused, self._refused = self._refused, {}
        return refused

    def forget(self, alive: Container[str]) -> None:
        """Drop what is known of requests that vLLM no longer knows."""
        self._waiting = {request_id for request_id in self._waiting if request_id in alive}
