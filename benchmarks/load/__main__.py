"""python -m benchmarks.load: loads a server, its own or --url: did anything go wrong, is anything left over?"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.accuracy.config import Server
from benchmarks.accuracy.server import serving
from benchmarks.load.asks import MOST_PROMPT
from benchmarks.load.clients import run_clients
from benchmarks.load.watch import Watch, growth, is_flat

MODEL = "benchmarks/small_model/smooth"
# A KV pool that its clients touch entirely in the first seconds, so that what grows later is a leak.
SERVER_FLAGS = ("--attention-backend", "calidrop", "--block-size", "32", "--num-gpu-blocks-override", "2048")


async def load(url: str, key: str | None, clients: int, seconds: float, seed: int, longest: int) -> dict[str, Any]:
    """The report: counts, violations, what was held at most and is still held, memory."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{url}/v1/models") as response,
    ):
        model = (await response.json())["data"][0]["id"]
    watch, over = Watch(url, key), asyncio.Event()
    watching = asyncio.create_task(watch.watch(over))
    began = time.monotonic()
    outcome = await run_clients(url, key, model, clients, seconds, seed, longest)
    took = time.monotonic() - began
    over.set()
    await watching
    grown = growth(watch.memory)
    return {
        "model": model,
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "clients": clients,
        "seconds": round(took, 1),
        "seed": seed,
        "requests": dict(sorted(outcome.counts.items())),
        "tokens": outcome.tokens,
        "violations": outcome.violations,
        "peak": watch.peak,
        "left_over": await watch.left_over(),
        "memory": {name: round(value, 1) for name, value in grown.items()} | {"samples": len(watch.memory)},
        "memory_is_flat": is_flat(grown),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--url", help="a server that runs already, with /calidrop/stats; else one is started")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=MOST_PROMPT, help="tokens of the longest prompt")
    parser.add_argument("--output", type=Path, help="where the report goes as JSON")
    given = parser.parse_args()
    with ExitStack() as stack:
        url = given.url
        if url is None:
            log = Path(tempfile.mkdtemp(prefix="calidrop-load-")) / "server.log"
            print(f"server log: {log}", file=sys.stderr)
            server = Server(model=MODEL, args=list(SERVER_FLAGS), env={"VLLM_PLUGINS": "calidrop"})
            url = stack.enter_context(serving(server, log)).removesuffix("/v1")
        report = asyncio.run(load(url, given.key, given.clients, given.seconds, given.seed, given.longest))
    text = json.dumps(report, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    sys.exit(0 if not report["violations"] and not report["left_over"] and report["memory_is_flat"] else 1)


if __name__ == "__main__":
    main()
