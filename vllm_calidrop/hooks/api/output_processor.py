"""Wraps `RequestState`: takes the report out of `kv_transfer_params` and puts it on the completion.

Why: the engine core can send only `kv_transfer_params` beside the tokens, and vLLM drops those in streams, for all but
the last of n children and for all but the first prompt. The per-request state sees every output of its own request; it
keeps the latest report (so an abort has one too), hands vLLM the rest of the params, and each `CompletionOutput` gets
the report as its attribute `calidrop`. One dict per request is updated in place: outputs that vLLM merges while a
stream's consumer is slow keep the reference and so have the latest numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.settings.request import REPORT_KEY

_EXPECTED = ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params")


def install() -> None:
    when_imported("vllm.v1.engine.output_processor", _wrap)


def report_of(completion: Any) -> dict[str, Any] | None:
    """The report of one completion so far; None without the backend, or before the engine's first answer."""
    report: dict[str, Any] | None = getattr(completion, REPORT_KEY, None)
    return report


def _wrap(module: ModuleType) -> None:
    # So that `out.outputs[0].calidrop` can be asked on any engine.
    module.CompletionOutput.calidrop = None
    wrap_method(module.RequestState, "make_request_output", _keeping_report, _EXPECTED)
    wrap_method(module.RequestState, "_new_completion_output", _attaching_report, ("self",))


def _keeping_report(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if kv_transfer_params and REPORT_KEY in kv_transfer_params:
            self.__dict__.setdefault(REPORT_KEY, {}).update(kv_transfer_params[REPORT_KEY])
            rest = {name: value for name, value in kv_transfer_params.items() if name != REPORT_KEY}
            kv_transfer_params = rest or None
        return original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *args,
            **kwargs,
        )

    return make_request_output


def _attaching_report(original: Callable[..., Any]) -> Callable[..., Any]:
    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        completion = original(self, *args, **kwargs)
        report = getattr(self, REPORT_KEY, None)
        if report is not None:
            completion.calidrop = report
        return completion

    return _new_completion_output
