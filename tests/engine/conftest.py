"""Engines that tests share. Everything here is the real vLLM; `harness.Engine` runs it in this process."""

from __future__ import annotations

import os

# Before vLLM is imported anywhere: the engine in this process, one thread, no core binding.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator

import pytest

from tests.engine.cases import MODEL, CachedReference
from tests.engine.harness import Engine

# The engines CI shares, by name. Contexts go to 1,000 tokens; the model has 1,152 positions.
ENGINES = {
    "block32-whole": {"block_size": 32, "max_num_batched_tokens": 4096},
    "block16-chunk100": {"block_size": 16, "max_num_batched_tokens": 100},
    "block128-chunk64": {"block_size": 128, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 512},
    "stock": {"backend": None, "block_size": 32, "max_num_batched_tokens": 4096},
    # 1,000 tokens are 32 blocks: one uncompressed prompt and some compressed ones, no two uncompressed.
    "small-pool": {
        "block_size": 32,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 61,
        "additional_config": {"calidrop": {"swap_bytes": 256 * 2**20}},
    },
}


@pytest.fixture(scope="session")
def engine_named() -> Iterator[Callable[[str], Engine]]:
    """An engine by its name in ENGINES, started when first asked for and kept."""
    started: dict[str, Engine] = {}

    def named(name: str) -> Engine:
        if name not in started:
            started[name] = Engine(MODEL, **ENGINES[name])
        return started[name]

    yield named
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="session")
def reference() -> CachedReference:
    return CachedReference()
