"""Wraps the serving handlers' `create_*` and the request models' `to_sampling_params`.

Why `create_*`: a bad setting must be refused before anything is rendered or started, or a streaming request would get
an HTTP 200 with the error inside. The handler knows its engine, so another engine's requests are left alone. It also
has the body as it was sent: pydantic turns a boolean inside `vllm_xargs` into 0 or 1, which must not become a budget
of one token, and routes that translate their request (Anthropic's) drop the fields they do not know.
Why `to_sampling_params`: there a request becomes `extra_args`, which the input processor reads. The names travel from
the one to the other in a context variable, so requests that did not come through a handler of ours stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api import openai_reports, verdict
from vllm_calidrop.hooks.api.bodies import CLIENT_ARGUMENT, field_with_a_lone_surrogate, misplaced_settings
from vllm_calidrop.hooks.api.input_processor import NOT_SETTINGS, bad_request, server_settings, settings_or_400
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.settings.request import RequestSettings, is_ours

_OPENAI = "vllm.entrypoints.openai"
_HANDLERS = (
    (f"{_OPENAI}.completion.serving", "OpenAIServingCompletion", "create_completion"),
    (f"{_OPENAI}.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    (f"{_OPENAI}.chat_completion.batch_serving", "OpenAIServingChatBatch", "create_batch_chat_completion"),
    (f"{_OPENAI}.responses.serving", "OpenAIServingResponses", "create_responses"),
)
_MODELS = (
    (f"{_OPENAI}.completion.protocol", "CompletionRequest", "max_tokens"),
    (f"{_OPENAI}.chat_completion.protocol", "ChatCompletionRequest", "max_tokens"),
    (f"{_OPENAI}.responses.protocol", "ResponsesRequest", "default_max_tokens"),
)
_TOKENS_HANDLER = ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens")

# The names asked for by the request that this task is serving; None outside of a handler of a selected engine.
_asked: ContextVar[dict[str, Any] | None] = ContextVar("calidrop_asked", default=None)


def install() -> None:
    for module, cls, name in _HANDLERS:
        _wrap_when_imported(module, cls, name, _checking_first, ("self", "request", "raw_request"))
    for module, cls, max_tokens in _MODELS:
        expected = ("self", max_tokens, "default_sampling_params")
        _wrap_when_imported(module, cls, "to_sampling_params", _adding_names, expected)
    _wrap_when_imported(*_TOKENS_HANDLER, _checking_sampling_params, ("self", "request", "raw_request"))


def _wrap_when_imported(
    module: str, cls: str, name: str, make_wrapper: Callable[..., Any], expected: tuple[str, ...]
) -> None:
    def wrap(imported: ModuleType) -> None:
        wrap_method(getattr(imported, cls), name, make_wrapper, expected)

    when_imported(module, wrap)


def _checking_first(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        server = server_settings(self.engine_client.input_processor)
        if server is None:
            return await original(self, request, raw_request)
        body = await _json_body(raw_request)
        if message := misplaced_settings(body):
            raise bad_request(message, CLIENT_ARGUMENT)
        if field := field_with_a_lone_surrogate(body):
            raise bad_request(f"{field} holds half of a surrogate pair, which is no Unicode text", field)
        asked = asked_names(request, body)
        settings = settings_or_400(asked, server)
        beams = getattr(request, "use_beam_search", False)
        if beams:
            # The beams' own requests cannot carry an explicit null, so a server default would reach them.
            for chosen in (settings, settings_or_400({}, server)):
                if chosen.compresses:
                    raise bad_request("kv_budget is not supported with beam search", "kv_budget", chosen.kv_budget)
        token = _asked.set(asked)
        try:
            if beams:  # every step of a beam is a prompt of its own, with nothing to report
                return await _create(original, self, request, raw_request, settings, None)
            with openai_reports.gathering() as gathered:
                answer = await _create(original, self, request, raw_request, settings, gathered)
            return openai_reports.with_reports(answer, gathered)
        finally:
            _asked.reset(token)

    return create


async def _create(
    original: Callable[..., Any],
    self: Any,
    request: Any,
    raw_request: Any,
    settings: RequestSettings,
    gathered: openai_reports.Gathering | None,
) -> Any:
    """The handler's answer; where the engine may refuse the admission, not before it has decided."""

    async def answered() -> Any:
        answer = await original(self, request, raw_request)
        if gathered is None or not hasattr(answer, "__anext__"):
            return answer
        return openai_reports.within(answer, gathered)

    if settings.kv_on_full not in ("wait", "reject") or not settings.calibrates:
        return await answered()
    background = bool(getattr(request, "background", False))
    streaming = bool(request.stream) and not background
    ruling = verdict.Verdict(streaming, every_choice=settings.kv_on_full == "reject")
    token = verdict.current.set(ruling)
    try:
        answer = await answered()
        if background or not hasattr(answer, "__anext__"):
            return answer
        return await verdict.after_verdict(answer, ruling)
    finally:
        verdict.current.reset(token)


def _adding_names(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        if asked := _asked.get():
            # A new dict: vLLM's may be the request's own `vllm_xargs`.
            params.extra_args = {**(params.extra_args or {}), **asked}
        return params

    return to_sampling_params


def _checking_sampling_params(original: Callable[..., Any]) -> Callable[..., Any]:
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        server = server_settings(self.engine_client.input_processor)
        if server is not None:
            for name, value in _ours(await _json_body(raw_request)).items():
                raise bad_request(f"{name} belongs into sampling_params.extra_args on this route", name, value)
            settings = settings_or_400(request.sampling_params.extra_args or {}, server)
            return await _create(original, self, request, raw_request, settings, None)
        return await original(self, request, raw_request)

    return serve_tokens


def asked_names(request: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Every name of ours in a request, from its top level and from `vllm_xargs`, with the values as they were sent."""
    top = {**_ours(body), **_ours(getattr(request, "model_extra", None) or {})}
    sent = body.get("vllm_xargs")
    sent = sent if isinstance(sent, dict) else {}
    xargs = _ours(getattr(request, "vllm_xargs", None) or {})
    for name, value in xargs.items():
        if isinstance(sent.get(name), bool) and sent[name] == value:
            xargs[name] = sent[name]
    for name in top.keys() & xargs.keys():
        if (type(top[name]), top[name]) != (type(xargs[name]), xargs[name]):
            raise bad_request(
                f"{name} is given twice: {top[name]!r} and, in vllm_xargs, {xargs[name]!r}", name, top[name]
            )
    return {**xargs, **top}


def _ours(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if is_ours(name) or name in NOT_SETTINGS}


async def _json_body(raw_request: Any) -> Mapping[str, Any]:
    """The body as it was sent; the framework parsed and kept it, so this costs nothing. Batch files have none."""
    if raw_request is None:
        return {}
    try:
        body = await raw_request.json()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # Form data, or a caller's stand-in for a request: the model's own fields remain.
        return {}
    return body if isinstance(body, dict) else {}
