"""Starts `vllm serve` for a run and stops it after."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.accuracy.config import Server
from benchmarks.accuracy.models import serve_arguments

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Otherwise vLLM's CPU worker binds itself to the first core, and two servers of one machine share it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program() -> str:
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise SystemExit("no `vllm` beside this Python or on the PATH: give --base-url")
    return found


@contextmanager
def serving(server: Server, log: Path) -> Iterator[str]:
    """The base URL of a server that answers; it is stopped on exit. What it prints goes to `log`."""
    port = _free_port()
    command = [
        _program(),
        "serve",
        *serve_arguments(server.model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *server.args,
    ]
    environment = {**ENVIRONMENT, **os.environ, **server.env}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_healthy(process, port, server.start_timeout, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, timeout: float, log: Path) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}; see {log}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server did not answer within {timeout:.0f} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the first process, which ends the others; whatever of its session is left after 20 s is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
