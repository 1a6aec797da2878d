"""What the server holds while it is loaded and afterwards: /calidrop/stats, and the memory of its processes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

EVERY_SECONDS = 2.0
IDLE_SECONDS = 60.0
MIB = 2**20
# Memory is flat if, after the first third of the run, the line through the samples rises by less than this in all.
WARM_UP = 1 / 3
FLAT_SHARE, FLAT_MIB = 0.02, 24.0


@dataclass
class Watch:
    """memory: (seconds, MiB) samples of the proportional set size of the server's processes. peak: of what is held."""

    url: str
    key: str | None
    memory: list[tuple[float, float]] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)

    async def watch(self, over: asyncio.Event) -> None:
        processes, began = server_processes(self.url), time.monotonic()
        async with aiohttp.ClientSession() as session:
            while not over.is_set():
                held = in_use(await self.stats(session))
                self.peak = {name: max(value, self.peak.get(name, 0)) for name, value in held.items()}
                pss = await asyncio.to_thread(total_pss, processes)
                self.memory.append((time.monotonic() - began, pss / MIB))
                await asyncio.sleep(EVERY_SECONDS)

    async def stats(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with session.get(f"{self.url}/calidrop/stats", headers=headers) as response:
            response.raise_for_status()
            answer: dict[str, Any] = await response.json()
            return answer

    async def left_over(self) -> dict[str, int]:
        """What is still held some time after the last client went: empty if nothing is."""
        deadline = time.monotonic() + IDLE_SECONDS
        async with aiohttp.ClientSession() as session:
            while True:
                held = {name: value for name, value in in_use(await self.stats(session)).items() if value}
                if not held or time.monotonic() > deadline:
                    return held
                await asyncio.sleep(1.0)


def in_use(stats: dict[str, Any]) -> dict[str, int]:
    """Everything that must be zero when no request lives, over all engines."""
    engines = stats["engines"]
    return {
        "sequences": sum(len(engine["sequences"]) for engine in engines),
        "waiting": sum(engine["waiting"] for engine in engines),
        "kv_blocks": sum(engine["kv_blocks"]["used"] for engine in engines),
        "swap_blocks": sum(engine["swap"]["used_blocks"] for engine in engines),
        "sketch_blocks": sum(engine["sketch"]["used_blocks"] for engine in engines),
        "buffer_pages": sum(engine["buffer"]["used_pages"] for engine in engines),
    }


def server_processes(url: str) -> list[psutil.Process]:
    """The process that listens there, and all of its children."""
    port = urlsplit(url).port
    found = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
    }
    if not found:
        return []
    listener = psutil.Process(min(found))
    return [listener, *listener.children(recursive=True)]


def total_pss(processes: list[psutil.Process]) -> int:
    return sum(process.memory_full_info().pss for process in processes if process.is_running())


def growth(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Mean MiB after the warm-up, and what the least-squares line through those samples rises by, start to end."""
    start = memory[-1][0] * WARM_UP if memory else 0.0
    late = [(at, mib) for at, mib in memory if at >= start]
    if len(late) < 3:
        return {}
    mean_at, mean = sum(at for at, _ in late) / len(late), sum(mib for _, mib in late) / len(late)
    spread = sum((at - mean_at) ** 2 for at, _ in late)
    slope = sum((at - mean_at) * (mib - mean) for at, mib in late) / spread
    return {
        "mean_mib": mean,
        "rise_mib": slope * (late[-1][0] - late[0][0]),
        "first_mib": late[0][1],
        "last_mib": late[-1][1],
    }


def is_flat(grown: dict[str, float]) -> bool:
    return bool(grown) and grown["rise_mib"] < max(FLAT_MIB, FLAT_SHARE * grown["mean_mib"])
