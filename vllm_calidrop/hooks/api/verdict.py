"""Wraps `AsyncLLM.generate`: an admission that the engine refuses becomes an HTTP status, for streams too.

Why: the engine decides about `kv_on_full: wait` and `reject` when a request is at the head of its queue. By then a
stream has its headers, unless its handler waits for the verdict: the first output, or the refusal. In the same wrap the
outputs are watched for the reports of the response (hooks/api/openai_reports.py). Other requests are not touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api import openai_reports, refusals
from vllm_calidrop.hooks.api.input_processor import bad_value
from vllm_calidrop.hooks.api.output_processor import report_of
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method

# How long a client should wait before it asks again; answers take seconds.
RETRY_AFTER_SECONDS = 1


class Verdict:
    """What the engine says to the prompts of one HTTP request.

    streaming: a handler waits in `after_verdict`. every_choice: for all n choices of a prompt, not for its first.
    """

    def __init__(self, streaming: bool, every_choice: bool) -> None:
        self.every_choice = every_choice
        self._streaming = streaming
        self._unknown = 0
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ask(self) -> None:
        """A prompt was handed to the engine."""
        self._unknown += 1

    def admitted(self) -> None:
        """One of them was answered."""
        self._unknown -= 1
        if self._unknown == 0 and not self.known.done():
            self.known.set_result(None)

    async def refused(self, error: Exception) -> None:
        """One was refused. Raises, or leaves it to the waiting handler, whose stream would report it as its failure."""
        if not self._streaming or self.known.done():
            raise error
        self.known.set_exception(error)
        await asyncio.get_running_loop().create_future()  # until that handler closes the stream


current: ContextVar[Verdict | None] = ContextVar("calidrop_verdict", default=None)


def install() -> None:
    when_imported("vllm.v1.engine.async_llm", _wrap)
    when_imported("vllm.entrypoints.launchers.app", _wrap_app)


def _wrap(module: ModuleType) -> None:
    wrap_method(module.AsyncLLM, "generate", _giving_verdict, ("self", "prompt", "sampling_params", "request_id"))


def _wrap_app(module: ModuleType) -> None:
    wrap_method(module, "init_exception_handler", _with_retry_after, ("app",))


async def after_verdict(stream: Any, verdict: Verdict) -> Any:
    """Returns the same stream when all its prompts are admitted; raises what refuses one."""
    held: list[Any] = []
    pending: asyncio.Task[Any] | None = None
    try:
        while not verdict.known.done():
            pending = asyncio.create_task(anext(stream))
            await asyncio.wait({pending, verdict.known}, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                break
            try:
                held.append(pending.result())
            except StopAsyncIteration:
                return _continued(held, None, stream)
            pending = None
        verdict.known.result()
    except BaseException:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await stream.aclose()
        raise
    return _continued(held, pending, stream)


async def _continued(held: list[Any], pending: asyncio.Task[Any] | None, stream: Any) -> AsyncIterator[Any]:
    async with aclosing(stream):
        for chunk in held:
            yield chunk
        if pending is not None:
            try:
                yield await pending
            except StopAsyncIteration:
                return
        async for chunk in stream:
            yield chunk


def _giving_verdict(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        verdict = current.get()
        outputs = original(self, prompt, sampling_params, *args, **kwargs)
        # Pooling parameters have no choices; neither they nor other engines have anything to report.
        outputs = openai_reports.watched(outputs, getattr(sampling_params, "n", 1))
        if verdict is None:
            return outputs
        return _watched(outputs, verdict, sampling_params.n if verdict.every_choice else 1)

    return generate


async def _watched(outputs: Any, verdict: Verdict, choices: int) -> AsyncIterator[Any]:
    verdict.ask()
    admitted: set[int] = set()
    async with aclosing(outputs):
        async for output in outputs:
            for completion in output.outputs:
                report = report_of(completion)
                if report is not None and report["mode"] == "refused":
                    await verdict.refused(_error_of(report))
            if len(admitted) < choices:
                admitted.update(completion.index for completion in output.outputs)
                if len(admitted) >= choices:
                    verdict.admitted()
            yield output


def _error_of(report: dict[str, Any]) -> Exception:
    from vllm_calidrop.hooks.api.retry import PoolFullError

    reason: refusals.Reason = report["reason"]
    refusals.refused(reason)
    if reason == "never_fits":
        return bad_value(
            f"kv_on_full: the evicted KV of {report['prompt_tokens']} prompt tokens would not fit this server's empty "
            "host pool; use full or evict, or a smaller kv_calibration_size",
            "kv_on_full",
        )
    return PoolFullError(
        "The host pool has no room for this request's evicted KV (kv_on_full: reject). Ask again later.",
        RETRY_AFTER_SECONDS,
    )


def _with_retry_after(original: Callable[..., None]) -> Callable[..., None]:
    def init_exception_handler(app: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_calidrop.hooks.api.retry import PoolFullError, answer_pool_full

        original(app, *args, **kwargs)
        app.exception_handler(PoolFullError)(answer_pool_full)

    return init_exception_handler
