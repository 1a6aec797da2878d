"""Wraps the offline `LLM.beam_search`.

Why: every step of a beam is a new request whose prompt holds generated tokens, so a server-wide default budget would
evict something else at every step. (Over HTTP the handlers refuse it; beam parameters cannot carry a budget.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api.input_processor import bad_request, server_settings, settings_or_400
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method


def install() -> None:
    when_imported("vllm.entrypoints.generate.beam_search.offline", _wrap)


def _wrap(module: ModuleType) -> None:
    wrap_method(module.BeamSearchOfflineMixin, "beam_search", _refusing_default_budget, ("self", "prompts", "params"))


def _refusing_default_budget(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        server = server_settings(self.llm_engine.input_processor)
        if server is not None and (settings := settings_or_400({}, server)).compresses:
            raise bad_request("kv_budget is not supported with beam search", "kv_budget", settings.kv_budget)
        return original(self, *args, **kwargs)

    return beam_search
