"""Wraps the serving handlers' response builders: the report becomes `calidrop` at the response's top level.

Why here: a response body is built from engine outputs in these methods only, and only here all choices of one response
are together. One entry per choice, in the order of the choices (null for one that ended before the engine's first
answer). Streams carry it on their last chunk before `[DONE]`: the wrapped stream passes every chunk on at once until
all choices have finished, and only then keeps one chunk back to see whether it was the last.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api.input_processor import server_settings
from vllm_calidrop.hooks.api.output_processor import report_of
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.settings.request import REPORT_KEY

_OPENAI = "vllm.entrypoints.openai"
_DONE = "data: [DONE]"

Reports = list[dict[str, Any] | None]


def install() -> None:
    when_imported(f"{_OPENAI}.completion.serving", _wrap_completion)
    when_imported(f"{_OPENAI}.chat_completion.serving", _wrap_chat)
    when_imported(f"{_OPENAI}.chat_completion.batch_serving", _wrap_chat_batch)
    when_imported(f"{_OPENAI}.responses.serving", _wrap_responses)
    when_imported(f"{_OPENAI}.responses.context", _wrap_responses_contexts)


def _wrap_completion(module: ModuleType) -> None:
    cls = module.OpenAIServingCompletion
    wrap_method(
        cls,
        "request_output_to_completion_response",
        _reporting_outputs,
        ("self", "final_res_batch", "request"),
    )
    wrap_method(
        cls,
        "completion_stream_generator",
        _reporting_completion_stream,
        ("self", "request", "engine_inputs", "result_generator"),
    )


def _wrap_chat(module: ModuleType) -> None:
    cls, expected = module.OpenAIServingChat, ("self", "request", "result_generator")
    wrap_method(cls, "chat_completion_full_generator", _reporting_chat, expected)
    wrap_method(cls, "chat_completion_stream_generator", _reporting_chat_stream, expected)


def _wrap_chat_batch(module: ModuleType) -> None:
    wrap_method(
        module.OpenAIServingChatBatch,
        "chat_completion_full_generator_batch",
        _reporting_chat_batch,
        ("self", "request", "generators"),
    )


def _wrap_responses(module: ModuleType) -> None:
    wrap_method(
        module.OpenAIServingResponses,
        "responses_full_generator",
        _reporting_response,
        ("self", "request", "sampling_params", "result_generator", "context"),
    )


def _wrap_responses_contexts(module: ModuleType) -> None:
    for cls in (module.SimpleContext, module.ParsableContext, module.HarmonyContext):
        wrap_method(cls, "append_output", _remembering_report, ("self", "output"))


class _Reports:
    """The latest report of every choice of one response, gathered as the engine's outputs pass by."""

    def __init__(self, choices: int) -> None:
        self.latest: Reports = [None] * choices
        self.running = set(range(choices))

    @property
    def complete(self) -> bool:
        return not self.running

    def see(self, completions: Iterable[Any], first_choice: int = 0) -> None:
        for completion in completions:
            choice = first_choice + completion.index
            self.latest[choice] = report_of(completion)
            if completion.finished():
                self.running.discard(choice)


def _selected(handler: Any) -> bool:
    return server_settings(handler.engine_client.input_processor) is not None


def _attach(response: Any, reports: Reports) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if not isinstance(response, ErrorResponse):
        setattr(response, REPORT_KEY, reports)  # the models of responses allow extra fields


def _reporting_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, final_res_batch, *args, **kwargs)
        if _selected(self):
            _attach(response, [report_of(output) for result in final_res_batch for output in result.outputs])
        return response

    return request_output_to_completion_response


def _reporting_completion_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _selected(self):
            return original(self, request, engine_inputs, result_generator, *args, **kwargs)
        n = request.n or 1
        reports = _Reports(n * len(engine_inputs))

        async def results() -> AsyncIterator[Any]:
            async with aclosing(result_generator):
                async for prompt, result in result_generator:
                    reports.see(result.outputs, prompt * n)
                    yield prompt, result

        stream = original(self, request, engine_inputs, results(), *args, **kwargs)
        return _with_reports_on_last_chunk(stream, reports)

    return completion_stream_generator


def _reporting_chat_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _selected(self):
            return original(self, request, result_generator, *args, **kwargs)
        reports = _Reports(request.n or 1)
        stream = original(self, request, _seen(result_generator, reports), *args, **kwargs)
        return _with_reports_on_last_chunk(stream, reports)

    return chat_completion_stream_generator


def _reporting_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _selected(self):
            return await original(self, request, result_generator, *args, **kwargs)
        reports = _Reports(request.n or 1)
        response = await original(self, request, _seen(result_generator, reports), *args, **kwargs)
        _attach(response, reports.latest)
        return response

    return chat_completion_full_generator


def _reporting_chat_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    async def chat_completion_full_generator_batch(
        self: Any, request: Any, generators: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _selected(self):
            return await original(self, request, generators, *args, **kwargs)
        reports = [_Reports(1) for _ in generators]
        seen = [_seen(results, report) for results, report in zip(generators, reports, strict=True)]
        response = await original(self, request, seen, *args, **kwargs)
        _attach(response, [report.latest[0] for report in reports])
        return response

    return chat_completion_full_generator_batch


def _reporting_response(original: Callable[..., Any]) -> Callable[..., Any]:
    # The streaming path builds its final event's response with this method as well.
    async def responses_full_generator(
        self: Any,
        request: Any,
        sampling_params: Any,
        result_generator: Any,
        context: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = await original(self, request, sampling_params, result_generator, context, *args, **kwargs)
        if _selected(self):
            _attach(response, [getattr(context, REPORT_KEY, None)])
        return response

    return responses_full_generator


def _remembering_report(original: Callable[..., Any]) -> Callable[..., Any]:
    # With built-in tools a response takes several engine requests; the last one's report counts.
    def append_output(self: Any, output: Any) -> Any:
        if output.outputs:
            setattr(self, REPORT_KEY, report_of(output.outputs[0]))
        return original(self, output)

    return append_output


async def _seen(result_generator: Any, reports: _Reports) -> AsyncIterator[Any]:
    async with aclosing(result_generator):
        async for result in result_generator:
            reports.see(result.outputs)
            yield result


async def _with_reports_on_last_chunk(stream: Any, reports: _Reports) -> AsyncIterator[str]:
    held: str | None = None
    async with aclosing(stream):
        async for chunk in stream:
            if held is not None:
                yield _with_reports(held, reports.latest) if chunk.startswith(_DONE) else held
                held = None
            if reports.complete and not chunk.startswith(_DONE):
                held = chunk
            else:
                yield chunk
    if held is not None:
        yield held


def _with_reports(chunk: str, latest: Reports) -> str:
    """Add the field to a chunk's JSON object as text: everything vLLM wrote stays byte for byte."""
    body = chunk.rstrip("\n")
    if not body.startswith("data: {") or body.startswith('data: {"error"'):
        return chunk
    field = json.dumps({REPORT_KEY: latest}, separators=(",", ":"))
    return f"{body[:-1]},{field[1:]}\n\n"
