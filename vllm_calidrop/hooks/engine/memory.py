"""vLLM gives all memory it finds to the KV pool; ours must be left over.

`determine_available_memory` is wrapped on both workers (the CPU one overrides it). vLLM's own profile run never sees
our buffers: they are made afterwards, and untouched pages are not resident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.selection import is_selected


def install() -> None:
    when_imported("vllm.v1.worker.gpu_worker", lambda module: _wrap(module.Worker))
    when_imported("vllm.v1.worker.cpu_worker", lambda module: _wrap(module.CPUWorker))


def _wrap(worker: type) -> None:
    wrap_method(worker, "determine_available_memory", _leave_room, ("self",))


def _leave_room(original: Callable[..., int]) -> Callable[..., int]:
    def determine_available_memory(self: Any, *args: Any, **kwargs: Any) -> int:
        available = original(self, *args, **kwargs)
        if not is_selected(self.vllm_config):
            return available
        from vllm_calidrop.worker.room import leave_room

        return leave_room(self.vllm_config, self, available)

    return determine_available_memory
