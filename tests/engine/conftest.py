"""Engines that tests share. Everything here is the real vLLM; `harness.Engine` runs it in this process."""

from __future__ import annotations

import os

# Before vLLM is imported anywhere: the engine in this process, one thread, no core binding.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
        "additional_config": {
            "calidrop": {"swap_bytes": 256 * 2**20, "sketch_bytes": 8 * 2**20, "buffer_bytes": 8 * 2**20}
        },
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


SERVER_START_SECONDS = 600  # seconds on an idle machine, minutes on one that others use


VLLM_SERVE = ("vllm", "serve", MODEL, "--attention-backend", "calidrop")
CALIDROP_SERVER = ("calidrop-server", MODEL)


class Server(str):
    """A running server: its base URL, and the process that a user would stop."""

    process: subprocess.Popen[bytes]


@contextmanager
def serving(log: Path, *options: str, program: Sequence[str] = VLLM_SERVE, **environment: str) -> Iterator[Server]:
    """A server as a user starts it, in processes of its own; its base URL.

    Stopped with Ctrl-C, which must end it cleanly, as must whatever else a test stopped it with.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    port = free_port()
    command = [str(Path(sys.executable).with_name(program[0])), *program[1:]]
    command += ["--block-size", "32", "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=inherited | {"VLLM_LOGGING_LEVEL": "INFO"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_it_serves(process, log)
        running = Server(f"http://127.0.0.1:{port}")
        running.process = process
        yield running
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert process.returncode == 0, log.read_text()[-4000:]
    finally:
        process.kill()


def assert_no_fault(log: Path) -> None:
    """No error of the server's own: no 500, and no traceback until it was told to stop.

    Then vLLM may report EngineDeadError, with any backend: its server sees the engine go before it has stopped itself.
    """
    text = log.read_text()
    assert " 500 Internal Server Error" not in text
    served = text.partition("[shutdown] API server: shutdown triggered")[0]
    assert "Traceback" not in served, served[served.index("Traceback") - 500 :][:3000]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all HTTP tests: bf16, compiled. `--enable-scale-out` adds vLLM's token and abort routes."""
    with serving(tmp_path_factory.mktemp("server") / "log", "--enable-scale-out") as url:
        yield url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_serves(process: subprocess.Popen[bytes], log: Path) -> None:
    pause = threading.Event()
    for _ in range(2 * SERVER_START_SECONDS):
        text = log.read_text()
        if "Application startup complete" in text:
            return
        assert process.poll() is None, text[-4000:]
        pause.wait(0.5)
    raise AssertionError(f"no server after {SERVER_START_SECONDS} s:\n{log.read_text()[-4000:]}")
