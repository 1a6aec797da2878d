"""The reports of one response, gathered while it is made, and put into it as `calidrop` at its top level.

Every prompt of a request goes to the engine by `AsyncLLM.generate` (hooks/api/verdict.py wraps it), in the order of the
prompts and inside the handler's `create_*` method (hooks/api/openai_requests.py wraps those). So nothing that builds a
response has to be wrapped: the `create_*` wrapper opens a gathering in a context variable, every prompt's outputs are
watched in it, and what the handler returned gets the reports.

There is one entry per choice, in the order of the choices (null for one that ended before the engine's first answer).
Streams carry them on their last chunk before `[DONE]`: each chunk is passed on at once until all choices have finished,
and only then one is kept back to see whether it was the last. Anthropic's streams carry them on `message_delta`, the
event that says how the message ended. Two places are wrapped here because they make a response inside another one:
`OpenAIServingResponses.responses_full_generator`, whose response also is a field of a stream's last event, and
`AnthropicServingMessages.create_messages`, which translates what `create_chat_completion` has made.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api.input_processor import server_settings
from vllm_calidrop.hooks.api.output_processor import report_of
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.settings.request import REPORT_KEY

_DONE = "data: [DONE]"
_MESSAGE_DELTA = "event: message_delta"

Reports = list[dict[str, Any] | None]


class PromptReports:
    """The latest report of every choice of one prompt, gathered as the engine's outputs pass by."""

    def __init__(self, choices: int) -> None:
        self.latest: Reports = [None] * choices
        self.running = set(range(choices))

    def see(self, completions: Iterable[Any]) -> None:
        for completion in completions:
            self.latest[completion.index] = report_of(completion)
            if completion.finished():
                self.running.discard(completion.index)


class Gathering:
    """The reports of one response: of its prompts, in the order in which the handler gave them to the engine."""

    def __init__(self) -> None:
        self.prompts: list[PromptReports] = []

    @property
    def complete(self) -> bool:
        """Whether every choice of every prompt has finished."""
        return bool(self.prompts) and not any(prompt.running for prompt in self.prompts)

    @property
    def latest(self) -> Reports:
        return [report for prompt in self.prompts for report in prompt.latest]


_current: ContextVar[Gathering | None] = ContextVar("calidrop_reports", default=None)


def install() -> None:
    when_imported("vllm.entrypoints.openai.responses.serving", _wrap_responses)
    when_imported("vllm.entrypoints.anthropic.serving", _wrap_messages)


def _wrap_responses(module: ModuleType) -> None:
    wrap_method(
        module.OpenAIServingResponses,
        "responses_full_generator",
        _reporting_response,
        ("self", "request", "sampling_params", "result_generator", "context"),
    )


def _wrap_messages(module: ModuleType) -> None:
    expected = ("self", "request", "raw_request")
    wrap_method(module.AnthropicServingMessages, "create_messages", _reporting_messages, expected)


@contextmanager
def gathering() -> Iterator[Gathering | None]:
    """Gather what is generated inside; None where the caller is itself called by one that gathers."""
    if _current.get() is not None:
        yield None
        return
    opened = Gathering()
    token = _current.set(opened)
    try:
        yield opened
    finally:
        _current.reset(token)


def watched(outputs: Any, choices: int) -> Any:
    """The outputs of one prompt of the engine, whose reports join the gathering that is open here, if one is."""
    opened = _current.get()
    if opened is None:
        return outputs
    reports = PromptReports(choices)
    opened.prompts.append(reports)
    return _seen(outputs, reports)


async def within(stream: Any, opened: Gathering) -> AsyncIterator[Any]:
    """The same stream, with the gathering open whenever the stream works: some give prompts to the engine only then.

    It is opened anew for each chunk, because successive chunks may be asked for by different tasks.
    """
    async with aclosing(stream):
        while True:
            token = _current.set(opened)
            try:
                chunk = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _current.reset(token)
            yield chunk


def with_reports(answer: Any, opened: Gathering | None) -> Any:
    """What a `create_*` method returned, with the reports: a response, a stream, or an error, which stays as it is."""
    if opened is None:
        return answer
    if hasattr(answer, "__anext__"):
        return _with_reports_on_last_chunk(answer, opened)
    if opened.prompts and not _is_error(answer) and not hasattr(answer, REPORT_KEY):
        setattr(answer, REPORT_KEY, opened.latest)  # the models of responses allow extra fields
    return answer


def _is_error(answer: Any) -> bool:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    return isinstance(answer, ErrorResponse)


def _reporting_response(original: Callable[..., Any]) -> Callable[..., Any]:
    async def responses_full_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        response = await original(self, *args, **kwargs)
        opened = _current.get()
        if opened is not None and opened.prompts and not _is_error(response):
            # With built-in tools a response takes several prompts, one after another; the last one's report counts.
            setattr(response, REPORT_KEY, opened.prompts[-1].latest)
        return response

    return responses_full_generator


def _reporting_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create_messages(self: Any, request: Any, raw_request: Any = None) -> Any:
        if server_settings(self.engine_client.input_processor) is None:
            return await original(self, request, raw_request)
        with gathering() as opened:
            answer = await original(self, request, raw_request)
        if opened is None or _is_error(answer):
            return answer
        if hasattr(answer, "__anext__"):
            return _with_reports_on_message_delta(answer, opened)
        return _message_with_reports()(**dict(answer), **{REPORT_KEY: opened.latest})

    return create_messages


@cache
def _message_with_reports() -> Any:
    """Anthropic's response model with a field for the reports: it allows no others."""
    from pydantic import create_model
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse

    fields: dict[str, Any] = {REPORT_KEY: (Reports, ...)}
    return create_model(AnthropicMessagesResponse.__name__, __base__=AnthropicMessagesResponse, **fields)


async def _seen(outputs: Any, reports: PromptReports) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            reports.see(output.outputs)
            yield output


async def _with_reports_on_last_chunk(stream: Any, opened: Gathering) -> AsyncIterator[Any]:
    held: str | None = None
    async with aclosing(stream):
        async for chunk in stream:
            if not isinstance(chunk, str):  # an event of the responses' route, which carries a whole response
                yield chunk
                continue
            if held is not None:
                yield _with_reports(held, opened.latest) if chunk.startswith(_DONE) else held
                held = None
            if opened.complete and not chunk.startswith(_DONE):
                held = chunk
            else:
                yield chunk
    if held is not None:
        yield held


async def _with_reports_on_message_delta(stream: Any, opened: Gathering) -> AsyncIterator[str]:
    async with aclosing(stream):
        async for event in stream:
            if event.startswith(_MESSAGE_DELTA):
                name, _, data = event.partition("\n")
                yield f"{name}\n{_with_reports(data, opened.latest)}"
            else:
                yield event


def _with_reports(chunk: str, latest: Reports) -> str:
    """Add the field to a chunk's JSON object as text: everything vLLM wrote stays byte for byte."""
    body = chunk.rstrip("\n")
    if not body.startswith("data: {") or body.startswith('data: {"error"'):
        return chunk
    field = json.dumps({REPORT_KEY: latest}, separators=(",", ":"))
    return f"{body[:-1]},{field[1:]}\n\n"
