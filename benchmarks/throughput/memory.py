"""What serving costs in memory: the rise of peak PSS over the same engine idle, against what is accounted for.

16 sequences of equal prompts are evicted to a budget: the first one's prompt fills the prefix cache, so that it is
computed once; what each keeps, and all that it evicts, is its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.throughput.engine import Engine, random_prompt
from benchmarks.throughput.profiles import BUDGET, calidrop
from benchmarks.throughput.timing import load

SEQUENCES = 16


def measure(model: str, length: int) -> dict[str, Any]:
    """Bytes. accounted: swap and KV blocks written, the scratch of one compaction, a prompt's activations."""
    engine = Engine(model, "calidrop", length + 512)
    try:
        # A full-KV prompt of the same length first: what vLLM itself touches only when it computes.
        with _peak() as plain:
            engine.submit([random_prompt(length, 1)], 2, {})
            engine.finish()
        worker = engine.core.model_executor.driver_worker.worker
        pool, ledger = engine.core.scheduler.kv_cache_manager.block_pool, engine.core.scheduler.calidrop
        before, fresh = family_pss(), _written(worker.model_runner)
        with _peak() as seen:
            prompts = [random_prompt(length)] * SEQUENCES
            engine.submit(prompts[:1], 64 + SEQUENCES * 16, calidrop(0.7))
            engine.prefill()
            engine.submit(prompts[1:], 32, calidrop(0.7))
            engine.prefill()
            swap = ledger.ids.swap.num_used * _block_bytes(worker.calidrop.pool.pages, 1)
            used_blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            for _ in range(8):
                engine.step()
            sequences = len(engine.core.scheduler.running)
        written = _written(worker.model_runner) - fresh
        # What the same engine takes for a prompt without a budget and has given back when it is idle.
        prefill = max(plain) - before
        parts = {"swap": swap, "kv_pool": written, "scratch": _scratch(worker, length), "prefill": prefill}
        accounted = sum(parts.values())
        return {
            "model": model,
            "length": length,
            "load": load(),
            "sequences": sequences,
            "peak_kv_blocks": used_blocks,
            "idle_pss": before,
            "rise": max(seen) - before,
            "accounted": parts,
            "rise_to_accounted": (max(seen) - before) / accounted,
        }
    finally:
        engine.close()


def family_pss() -> int:
    """Proportional set size of this process and its children, in bytes."""
    own = psutil.Process()
    return sum(_pss(process.pid) for process in (own, *own.children(recursive=True)))


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def _block_bytes(pages: Any, dim: int) -> int:
    return int(pages.nbytes // pages.shape[dim])


def _written(runner: Any) -> int:
    """Bytes of the KV pool in memory pages that somebody has written to."""
    tensors = {tensor.data_ptr(): tensor for tensor in runner.kv_caches}
    return sum(_resident(address, tensor.nbytes) for address, tensor in tensors.items())


def _resident(address: int, size: int) -> int:
    """Bytes of [address, address + size) that lie in present pages, by /proc/self/pagemap."""
    page = 4096
    first, last = address // page, -(-(address + size) // page)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        entries = pagemap.read((last - first) * 8)
    return sum(entries[at + 7] >> 7 for at in range(0, len(entries), 8)) * page


def _scratch(worker: Any, length: int) -> int:
    """What a layer's compaction holds of a prompt at once: its evicted K and V, and for the first calibration their
    logits twice in float32 (in 16 bits also the K and V in float32)."""
    pages, table = worker.calidrop.pool.pages, worker.calidrop.table
    heads, head_dim = pages.shape[2], pages.shape[-1]
    copies = pages.itemsize + (4 if pages.itemsize < 4 else 0)
    return (length - BUDGET) * (2 * heads * head_dim * copies + 2 * heads * table.lse.shape[3] * 4)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Samples of the family's PSS while the context is open."""
    seen, done = [family_pss()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen.append(family_pss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen.append(family_pss())
