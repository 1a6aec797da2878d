"""`kv_on_full: wait` and `reject`: who waits, who is refused, and what a stream's handler does with the verdict."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_ledger import NOTHING, admit, make_ledger, make_request
from vllm_calidrop.hooks.api import refusals, verdict
from vllm_calidrop.hooks.api.retry import PoolFullError, answer_pool_full

EIGHT_BLOCKS = {"kv_budget": 100}  # of a prompt of 1,000 tokens: 900 evicted, 8 blocks


def test_a_waiting_request_is_admitted_when_there_is_room() -> None:
    ledger = make_ledger(swap_blocks=10)
    first = make_request(1000, **EIGHT_BLOCKS)
    assert admit(ledger, first) is not None
    waiting = make_request(1000, **EIGHT_BLOCKS, kv_on_full="wait")
    for _ in range(3):
        assert not ledger.admit(waiting)
    assert ledger.totals.swap_waits == 1
    assert ledger.full_pool.take_refused() == {}
    assert ledger.in_use["swap_blocks"] == 8
    ledger.release(first.request_id)
    assert ledger.admit(waiting)
    ledger.release(waiting.request_id)
    ledger.step_scheduled()
    ledger.step_processed({})
    assert ledger.in_use == NOTHING


def test_a_refused_request_is_ended_once() -> None:
    ledger = make_ledger(swap_blocks=10)
    admit(ledger, make_request(1000, **EIGHT_BLOCKS))
    refused = make_request(1000, **EIGHT_BLOCKS, kv_on_full="reject")
    for _ in range(2):
        assert not ledger.admit(refused)
    (decision,) = (ended := ledger.full_pool.take_refused()).values()
    assert list(ended) == [refused.request_id]
    assert (decision.mode, decision.reason, decision.prompt_len) == ("reject", "swap_full", 1000)
    assert ledger.full_pool.take_refused() == {}
    assert ledger.totals.fallbacks == {"swap_full": 0, "recall_full": 0}


@pytest.mark.parametrize("on_full", ["wait", "reject"])
@pytest.mark.parametrize(
    ("pools", "asked"),
    [
        ({"swap_blocks": 7}, {}),
        ({"sketches": 7}, {"kv_recall": "pages"}),
        ({"buffers": 3}, {"kv_recall": "pages", "kv_recall_buffer": 4}),
    ],
)
def test_what_could_never_fit_does_not_wait(on_full: str, pools: dict[str, int], asked: dict[str, Any]) -> None:
    ledger = make_ledger(**pools)
    request = make_request(1000, **EIGHT_BLOCKS, **asked, kv_on_full=on_full)
    assert not ledger.admit(request)
    assert [refused.reason for refused in ledger.full_pool.take_refused().values()] == ["never_fits"]
    assert ledger.in_use == NOTHING


def test_a_full_sketch_pool_refuses_by_its_own_name() -> None:
    ledger = make_ledger(sketches=10)
    admit(ledger, make_request(1000, **EIGHT_BLOCKS, kv_recall="pages"))
    assert not ledger.admit(make_request(1000, **EIGHT_BLOCKS, kv_recall="pages", kv_on_full="reject"))
    assert [refused.reason for refused in ledger.full_pool.take_refused().values()] == ["recall_full"]


def test_after_a_preemption_a_request_waits_and_is_not_refused() -> None:
    """It has answered: its client has a status and some tokens."""
    ledger = make_ledger(swap_blocks=10)
    admit(ledger, make_request(1000, **EIGHT_BLOCKS))
    resumed = make_request(1000, outputs=5, **EIGHT_BLOCKS, kv_on_full="reject")
    resumed.num_preemptions = 1
    assert not ledger.admit(resumed)
    assert ledger.full_pool.take_refused() == {}
    assert ledger.totals.swap_waits == 1


def output(index: int, mode: str = "calidrop", reason: str | None = None) -> Any:
    report = {"mode": mode, "reason": reason, "prompt_tokens": 9}
    return SimpleNamespace(outputs=[SimpleNamespace(index=index, calidrop=report)])


class Engine:
    """Outputs of one prompt as `generate` yields them; closed: whether the request was given up."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.closed = False

    async def generate(self, _prompt: Any, _params: Any) -> AsyncIterator[Any]:
        try:
            for one in self.outputs:
                await asyncio.sleep(0)
                yield one
        finally:
            self.closed = True


async def chunks(engine: Engine, n: int) -> AsyncIterator[str]:
    """A handler's stream: it may say something before it asks the engine, and reports an error as its own."""
    generate = verdict._giving_verdict(Engine.generate)
    yield "created"
    try:
        async for one in generate(engine, None, SimpleNamespace(n=n)):
            yield f"choice {one.outputs[0].index}"
    except Exception as error:
        yield f"failed: {error}"


def served(engine: Engine, n: int = 1, every_choice: bool = True) -> tuple[list[str], int]:
    """What the client gets, and how much of it was known when the headers could be sent."""

    async def serve() -> tuple[list[str], int]:
        ruling = verdict.Verdict(streaming=True, every_choice=every_choice)
        token = verdict.current.set(ruling)
        consumed = 0

        async def counted() -> AsyncIterator[str]:
            nonlocal consumed
            async for chunk in chunks(engine, n):
                consumed += 1
                yield chunk

        try:
            stream = await verdict.after_verdict(counted(), ruling)
        finally:
            verdict.current.reset(token)
        known = consumed
        return [chunk async for chunk in stream], known

    return asyncio.run(serve())


def test_an_admitted_stream_loses_nothing() -> None:
    engine = Engine(output(0), output(0), output(0))
    sent, known = served(engine)
    assert sent == ["created"] + ["choice 0"] * 3
    assert known <= 2, "the headers do not wait for the second token"


def test_headers_wait_for_every_choice_that_may_be_refused() -> None:
    outputs = [output(0), output(0), output(1), output(0)]
    sent, known = served(Engine(*outputs), n=2)
    assert sent == ["created", "choice 0", "choice 0", "choice 1", "choice 0"]
    assert known >= 3
    _, known = served(Engine(*outputs), n=2, every_choice=False)
    assert known <= 2


@pytest.mark.parametrize("reason", ["swap_full", "recall_full"])
def test_a_refused_stream_is_a_503_before_its_headers(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(refusals, "_listeners", [counted.append])
    engine = Engine(output(0, "refused", reason))
    with pytest.raises(PoolFullError):
        served(engine)
    assert engine.closed
    assert counted == [reason]


def test_a_stream_that_would_wait_for_ever_is_a_400() -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as refusal:
        served(Engine(output(0, "refused", "never_fits")))
    assert refusal.value.parameter == "kv_on_full"


def test_another_error_stays_the_streams() -> None:
    class Broken(Engine):
        async def generate(self, _prompt: Any, _params: Any) -> AsyncIterator[Any]:
            raise ValueError("broken")
            yield

    async def serve() -> list[str]:
        ruling = verdict.Verdict(streaming=True, every_choice=True)
        token = verdict.current.set(ruling)
        generate = verdict._giving_verdict(Broken.generate)

        async def stream() -> AsyncIterator[str]:
            try:
                async for _ in generate(Broken(), None, SimpleNamespace(n=1)):
                    yield "never"
            except ValueError as error:
                yield f"failed: {error}"

        sent = await verdict.after_verdict(stream(), ruling)
        verdict.current.reset(token)
        return [chunk async for chunk in sent]

    assert asyncio.run(serve()) == ["failed: broken"]


def test_a_client_that_leaves_before_the_verdict_gives_up_its_request() -> None:
    class Waiting(Engine):
        async def generate(self, _prompt: Any, _params: Any) -> AsyncIterator[Any]:
            try:
                await asyncio.Event().wait()
                yield
            finally:
                self.closed = True

    async def leave(engine: Waiting) -> None:
        ruling = verdict.Verdict(streaming=True, every_choice=True)
        verdict.current.set(ruling)
        generate = verdict._giving_verdict(Waiting.generate)

        async def stream() -> AsyncIterator[Any]:
            async for one in generate(engine, None, SimpleNamespace(n=1)):
                yield one

        handler = asyncio.create_task(verdict.after_verdict(stream(), ruling))
        await asyncio.sleep(0.01)
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler

    engine = Waiting()
    asyncio.run(leave(engine))
    assert engine.closed


def test_the_answer_says_when_to_ask_again() -> None:
    response = asyncio.run(answer_pool_full(None, PoolFullError("full", 3)))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert b'"code":503' in response.body
