"""Wraps the end of a traced request: vLLM's span `llm_request` also says what was kept, evicted and read again.

Why here: vLLM makes the span and ends it in one call, `instrument_manual`, out of attributes that `do_tracing` gathers
from its own figures only. The report of the request is remembered for the time of `do_tracing`, and added in that call.
Without `--otlp-traces-endpoint` neither is ever called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.settings.request import REPORT_KEY

PREFIX = "calidrop."
_report: ContextVar[dict[str, Any] | None] = ContextVar("report of the traced request", default=None)


def install() -> None:
    when_imported("vllm.v1.engine.output_processor", _wrap)


def attributes_of(report: dict[str, Any]) -> dict[str, str | int]:
    """The report's texts and numbers, by their names with `calidrop.` before them; what is null is left out."""
    return {PREFIX + name: value for name, value in report.items() if isinstance(value, (str, int))}


def _wrap(module: ModuleType) -> None:
    expected = ("self", "engine_core_output", "req_state", "iteration_stats")
    wrap_method(module.OutputProcessor, "do_tracing", _remembering_report, expected)
    wrap_method(module, "instrument_manual", _adding_report, ("span_name", "start_time", "end_time", "attributes"))


def _remembering_report(original: Callable[..., Any]) -> Callable[..., Any]:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> Any:
        token = _report.set(getattr(req_state, REPORT_KEY, None))
        try:
            return original(self, engine_core_output, req_state, iteration_stats)
        finally:
            _report.reset(token)

    return do_tracing


def _adding_report(original: Callable[..., Any]) -> Callable[..., Any]:
    def instrument_manual(
        span_name: str,
        start_time: int,
        end_time: int | None = None,
        attributes: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if report := _report.get():
            attributes = (attributes or {}) | attributes_of(report)
        return original(span_name, start_time, end_time, attributes, *args, **kwargs)

    return instrument_manual
