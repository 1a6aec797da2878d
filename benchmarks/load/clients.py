"""The clients: each asks, reads, leaves or errs, and asks again until the time is over."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.load.asks import Ask, draw, fault_of

LONGEST_PAUSE = 0.3
ANSWER_SECONDS = 600


@dataclass
class Outcome:
    """counts: requests by how they ended. violations: what was not asked for, the first of each kind of text."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    tokens: int = 0

    def violated(self, what: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < 20:
            self.violations.append(what[:500])


async def run_clients(
    url: str, key: str | None, model: str, clients: int, seconds: float, seed: int, longest: int
) -> Outcome:
    """All clients at once, for so long; every running request is read to its end."""
    outcome, over = Outcome(), asyncio.Event()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"{url}/v1/", headers=headers, timeout=timeout, connector=connector) as session:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, over.set)
        tasks = [client(session, random.Random(f"{seed}/{n}"), model, longest, over, outcome) for n in range(clients)]
        await asyncio.gather(*tasks)
    return outcome


async def client(
    session: aiohttp.ClientSession,
    rng: random.Random,
    model: str,
    longest: int,
    over: asyncio.Event,
    outcome: Outcome,
) -> None:
    while not over.is_set():
        await asyncio.sleep(rng.uniform(0, LONGEST_PAUSE))
        ask = draw(rng, model, longest)
        try:
            outcome.counts[await send(session, ask, outcome)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome.violated(f"{type(error).__name__}: {error}")


async def send(session: aiohttp.ClientSession, ask: Ask, outcome: Outcome) -> str:
    """How it ended: refused, left, completed, or wrong (then the outcome has a violation)."""
    async with session.post(ask.route, data=ask.content) as response:
        if ask.wrong:
            text = await response.text()
            if 400 <= response.status < 500 and "error" in json.loads(text):
                return "refused"
            outcome.violated(f"{response.status} for {ask.content[-80:]!r}: {text}")
            return "wrong"
        if response.status != 200:
            outcome.violated(f"{response.status} with {ask.settings}: {await response.text()}")
            return "wrong"
        if ask.leave_after == 0:
            response.close()
            return "left"
        chunks: list[dict[str, Any]] = []
        done = False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            chunks.append(json.loads(line[6:]))
            if ask.leave_after is not None and len(chunks) >= ask.leave_after:
                response.close()
                return "left"
    fault = fault_of(ask, chunks, done)
    if fault is not None:
        outcome.violated(f"{ask.route} {ask.settings}: {fault}")
        return "wrong"
    outcome.tokens += ask.max_tokens
    report = chunks[-1]["calidrop"][0]
    outcome.counts[f"mode {report['mode']}"] += 1
    return "completed"
