"""Asks an OpenAI-compatible endpoint: many requests at once, each tried again with back-off."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import openai

from benchmarks.accuracy.config import Client
from benchmarks.accuracy.samples import Sample

# What a long run meets while a server is loaded or restarted; anything else is the request's own fault.
TRANSIENT = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


@dataclass(frozen=True)
class Reply:
    """`report`: the server's `calidrop` entry for this answer; None from servers that have none."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    report: dict[str, Any] | None
    seconds: float
    attempts: int


def request_body(sample: Sample, fields: dict[str, Any], model: str, client: Client) -> dict[str, Any]:
    """The JSON body, complete: two requests are the same if and only if their bodies are."""
    body: dict[str, Any] = {"model": model, "max_tokens": sample.max_tokens, "temperature": client.temperature}
    if sample.stop:
        body["stop"] = sample.stop
    body |= {"extra_body": client.extra_body | fields}
    if client.mode == "completion" or sample.raw:
        return body | {"prompt": sample.prompt + sample.prefix}
    messages = sample.messages or [{"role": "user", "content": sample.prompt}]
    if sample.prefix and client.answer_prefix == "user":
        last = messages[-1] | {"content": messages[-1]["content"] + sample.prefix}
        messages = [*messages[:-1], last]
    elif sample.prefix:
        messages = [*messages, {"role": "assistant", "content": sample.prefix.strip()}]
        body["extra_body"] |= {"continue_final_message": True, "add_generation_prompt": False}
    return body | {"messages": messages}


class Endpoint:
    """One server. `base_url` ends in /v1; the key is OPENAI_API_KEY or none."""

    def __init__(self, base_url: str, client: Client, model: str | None = None) -> None:
        self.settings = client
        self._model = model
        self._api = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=client.timeout,
            max_retries=0,  # `ask` retries, and counts
        )

    async def model(self) -> str:
        """The name to ask for: the one given, else the first the server lists.

        A server that does not answer yet is waited for; SystemExit when it takes longer than `patience`.
        """
        deadline = time.monotonic() + self.settings.patience
        waiting = False
        while True:
            try:
                found = await self._api.models.list(timeout=30)
                break
            except TRANSIENT as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"no server answers at {self._api.base_url}: {error}") from None
                if not waiting:
                    print(f"waiting for the server at {self._api.base_url}", file=sys.stderr, flush=True)
                waiting = True
                await asyncio.sleep(2)
        if self._model is None:
            self._model = found.data[0].id
        return self._model

    async def ask(self, body: dict[str, Any]) -> Reply:
        """One answer. Waits 0.5, 1, 2, .. 30 s between attempts; raises what the last attempt met."""
        attempt = 0
        while True:
            attempt += 1
            start = time.monotonic()
            try:
                answer = await self._send(body)
            except TRANSIENT:
                if attempt > self.settings.retries:
                    raise
                await asyncio.sleep(min(30.0, 0.5 * 2 ** (attempt - 1)))
                continue
            choice = answer.choices[0]
            text = choice.message.content if hasattr(choice, "message") else choice.text
            reports = (answer.model_extra or {}).get("calidrop")
            usage = answer.usage
            return Reply(
                text=text or "",
                finish_reason=choice.finish_reason,
                prompt_tokens=usage.prompt_tokens if usage else None,
                completion_tokens=usage.completion_tokens if usage else None,
                report=reports[0] if isinstance(reports, list) and reports else None,
                seconds=round(time.monotonic() - start, 4),
                attempts=attempt,
            )

    async def _send(self, body: dict[str, Any]) -> Any:
        if "messages" in body:
            return await self._api.chat.completions.create(**body)
        return await self._api.completions.create(**body)

    async def close(self) -> None:
        await self._api.close()


async def drive(
    endpoint: Endpoint,
    bodies: Iterable[tuple[Any, dict[str, Any]]],
    on_reply: Callable[[Any, Reply], None],
    on_error: Callable[[Any, Exception], None],
    deadline: float | None = None,
) -> int:
    """Asks every (tag, body) in order, `concurrency` at a time; returns how many were left at the deadline
    (`time.monotonic()`). Replies are handed over as they come."""
    queue = iter(list(bodies))
    left = 0

    async def worker() -> None:
        nonlocal left
        for tag, body in queue:
            if deadline is not None and time.monotonic() > deadline:
                left += 1
                continue
            try:
                reply = await endpoint.ask(body)
            except openai.OpenAIError as error:
                on_error(tag, error)
            else:
                on_reply(tag, reply)

    async with asyncio.TaskGroup() as group:
        for _ in range(endpoint.settings.concurrency):
            group.create_task(worker())
    return left
