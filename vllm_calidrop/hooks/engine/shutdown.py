"""Before the grace time is over, requests that still run are ended as aborted: their streams end, with their reports.

`EngineCoreProc._handle_shutdown`, asked between two steps, is wrapped because after --shutdown-timeout seconds vLLM
kills an engine that still has work. Nobody ends those streams then: their clients wait, and the API process with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.selection import is_selected

logger = logging.getLogger("vllm.calidrop")

# What is kept of the grace time for ending streams and processes: at most half of it.
TEARDOWN_SECONDS = 5.0


def install() -> None:
    when_imported("vllm.v1.engine.core", lambda module: _wrap(module.EngineCoreProc))


def _wrap(engine: type) -> None:
    wrap_method(engine, "_handle_shutdown", _end_in_time, ("self",))


def _end_in_time(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def _handle_shutdown(self: Any) -> bool:
        goes_on = original(self)
        if goes_on and self.shutdown_state.name == "SHUTTING_DOWN" and is_selected(self.vllm_config):
            grace = self.vllm_config.shutdown_timeout
            began = self.__dict__.setdefault("calidrop_shutdown_began", time.monotonic())
            if time.monotonic() - began >= grace - min(TEARDOWN_SECONDS, grace / 2):
                _abort_all(self)
        return goes_on

    return _handle_shutdown


def _abort_all(engine: Any) -> None:
    from vllm.v1.request import RequestStatus

    aborted = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    if aborted:
        logger.warning("shutting down: %d requests are aborted, the grace time is over", len(aborted))
        engine._send_abort_outputs(aborted)
