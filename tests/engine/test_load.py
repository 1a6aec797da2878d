"""A short load of the kind that `python -m benchmarks.load` runs for minutes, and SIGTERM in the middle of streams."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx
import pytest

from benchmarks.load.__main__ import load
from benchmarks.load.asks import SETTINGS, WRONG, draw
from benchmarks.load.clients import Outcome, send
from tests.engine.conftest import CALIDROP_SERVER, Server, assert_no_fault, serving

pytestmark = pytest.mark.engine

CLIENTS, SECONDS = 40, 15
# Of the answers in flight at SIGTERM one ends within this time, the other cannot.
GRACE_SECONDS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Pools that the load fills: requests wait, and fall back to full KV."""
    log = tmp_path_factory.mktemp("load") / "log"
    small = json.dumps({"calidrop": {"swap_bytes": 16 * 2**20, "sketch_bytes": 2**20, "buffer_bytes": 2**20}})
    options = ("--enforce-eager", "--num-gpu-blocks-override", "300", "--shutdown-timeout", str(GRACE_SECONDS))
    with serving(log, *options, "--additional-config", small, program=CALIDROP_SERVER) as running:
        yield running
    assert_no_fault(log)


def test_nothing_breaks_and_nothing_is_left(server: Server) -> None:
    report = asyncio.run(load(str(server), None, CLIENTS, SECONDS, seed=1, longest=400))
    assert report["violations"] == []
    assert report["left_over"] == {}
    counts = report["requests"]
    assert min(counts[name] for name in ("completed", "left", "refused", "mode calidrop", "mode full")) > 0
    assert report["peak"]["sequences"] > CLIENTS / 4 and report["peak"]["swap_blocks"] > 0


@pytest.mark.parametrize("fault", WRONG)
def test_every_fault_is_a_refusal_of_its_own(server: Server, fault: str) -> None:
    """A 4xx with an error body, so that the load's own bad requests are what it takes them for."""
    model = httpx.get(f"{server}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": [10, 11, 12], "max_tokens": 2, "stream": True}
    text = json.dumps({name: value for name, value in body.items() if f'"{name}"' not in fault})
    content = f"{text[:-1]}, {fault}}}".encode()
    response = httpx.post(f"{server}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500 and response.json()["error"]["message"]


def test_a_wrong_answer_is_a_violation(server: Server) -> None:
    """The load's checks can fail: a request that is fine, said to be wrong, and the other way round."""
    model = httpx.get(f"{server}/v1/models").json()["data"][0]["id"]
    rng = random.Random(5)
    asks = [draw(rng, model, 200) for _ in range(60)]
    fine = next(
        ask for ask in asks if not ask.wrong and ask.leave_after is None and ask.settings.get("kv_budget") == 64
    )
    wrong = next(ask for ask in asks if ask.wrong)
    others = (
        dataclasses.replace(fine, wrong=True),
        dataclasses.replace(wrong, wrong=False),
        dataclasses.replace(fine, max_tokens=fine.max_tokens + 1),
        dataclasses.replace(fine, settings={"kv_budget": 5}),
    )

    async def ask_all() -> list[Outcome]:
        outcomes = []
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(f"{server}/v1/", headers=headers) as session:
            for ask in (fine, wrong, *others):
                outcomes.append(Outcome())
                await send(session, ask, outcomes[-1])
        return outcomes

    counted = [outcome.counts["violations"] for outcome in asyncio.run(ask_all())]
    assert counted == [0, 0, 1, 1, 1, 1]
    assert len(SETTINGS) > 10


def stream(url: str, max_tokens: int, begun: threading.Semaphore) -> list[str]:
    """The data lines of a stream that the server ends; `begun` is released at the first."""
    body: dict[str, Any] = {"prompt": [*range(10, 200)], "max_tokens": max_tokens, "temperature": 0, "kv_budget": 24}
    # A stop token that is never generated: outputs are not certain to come, so all are admitted at once.
    body |= {"stream": True, "ignore_eos": True, "stop_token_ids": [0]}
    lines = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
                if len(lines) == 1:
                    begun.release()
    return lines


def test_sigterm_in_the_middle_of_streams(server: Server) -> None:
    """Short answers are finished; those that do not end within the grace time are ended as aborted, with reports."""
    lengths, begun = [3] * 2 + [900] * 40, threading.Semaphore(0)
    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = [pool.submit(stream, str(server), length, begun) for length in lengths]
        for _ in lengths:
            assert begun.acquire(timeout=120)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        for length, answer in zip(lengths, answers):
            *_, last, done = answer.result()
            assert done == "[DONE]"
            ended = json.loads(last)
            assert ended["choices"][0]["finish_reason"] == ("length" if length == 3 else "abort")
            assert ended["calidrop"][0]["kept"] in (24, 190)
