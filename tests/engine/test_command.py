"""`calidrop-server` as a newcomer meets it: mistakes are one line and status 2, and a stop leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.engine.cases import MODEL
from tests.engine.conftest import free_port

pytestmark = pytest.mark.engine

PROGRAM = str(Path(sys.executable).with_name("calidrop-server"))
# On an idle machine each takes about a second; vLLM's own parser takes more than ten to be imported.
EARLY_SECONDS = 20


def refused(*arguments: str, **environment: str) -> str:
    """What `calidrop-server` says before it ends with status 2: one line of our own and nothing else."""
    began = time.monotonic()
    run = subprocess.run(
        [PROGRAM, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == "" and run.stderr.startswith("calidrop-server: ") and run.stderr.count("\n") == 1, run.stderr
    assert time.monotonic() - began < EARLY_SECONDS
    return run.stderr


@contextmanager
def taken_port(listening: bool) -> Iterator[int]:
    """A port of 127.0.0.1 that another server has: one that serves, or one that still loads."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("arguments", [[], ["--port", "8123"], ["--enforce-eager"]], ids=" ".join)
def test_no_model(arguments: list[str]) -> None:
    assert "name a model" in refused(*arguments)


def test_a_path_that_is_missing_and_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "does not exist" in refused(str(tmp_path / "nowhere"))
    assert "does not exist" in refused("--model", "./nowhere")
    assert "without a config.json" in refused(str(tmp_path))


def test_a_name_on_the_hub_without_a_network() -> None:
    said = refused("nobody/no-such-model", HF_HUB_OFFLINE="1")
    assert "nobody/no-such-model" in said and "HF_HUB_OFFLINE is set" in said and "name a folder" in said
    with taken_port(listening=False) as port:
        said = refused("nobody/no-such-model", HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert "cannot be reached" in said and "name a folder" in said


@pytest.mark.parametrize("listening", [True, False], ids=["serves", "loads"])
def test_a_port_in_use(listening: bool) -> None:
    with taken_port(listening) as port:
        said = refused(MODEL, "--host", "127.0.0.1", "--port", str(port))
    assert f"port {port} of 127.0.0.1 is in use" in said and "--port" in said


def test_settings_given_as_flags() -> None:
    said = refused(MODEL, "--kv-budget", "128")
    assert """--additional-config '{"calidrop": {"kv_budget": 128}}'""" in said and "JSON body" in said
    assert '"swap_bytes": 4096' in refused(MODEL, "--swap_bytes=4096")


def test_settings_that_cannot_be() -> None:
    assert "is not JSON" in refused(MODEL, "--additional-config", "{kv_budget: 1}")
    assert "'swap_byte'" in refused(MODEL, "--additional-config", '{"calidrop": {"swap_byte": 1}}')
    assert "kv_budget" in refused(MODEL, "--additional-config", '{"calidrop": {"kv_budget": 0}}')
    said = refused(MODEL, "--additional-config", json.dumps({"calidrop": {"swap_bytes": 2**60}}))
    assert "swap_bytes" in said and "free memory" in said and "lower it" in said


def test_what_vllm_refuses_is_one_line_too() -> None:
    """The last line says it, without a traceback of anybody's."""
    arguments = [PROGRAM, MODEL, "--port", str(free_port()), "--kv-cache-dtype", "fp8"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr + run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("calidrop-server: --attention-backend calidrop does not support: a quantised KV cache")


def test_help_is_ours() -> None:
    run = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "usage: calidrop-server MODEL" in run.stdout and "plan" in run.stdout


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "block size 32"),  # while vLLM is imported
        (signal.SIGINT, "EngineCore pid="),  # while the engine loads
        (signal.SIGKILL, "EngineCore pid="),  # not even then may the server outlive its supervisor
    ],
    ids=["term", "int", "kill"],
)
def test_stopped_while_it_starts(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [PROGRAM, MODEL, "--enforce-eager", "--host", "127.0.0.1", "--port", str(free_port())],
            env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    family: list[psutil.Process] = []
    try:
        pause = threading.Event()
        for _ in range(3000):
            if moment in log.read_text():
                break
            assert process.poll() is None, log.read_text()[-3000:]
            pause.wait(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(number)
        asked = time.monotonic()
        status = process.wait(timeout=15)
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        # Nobody watches over the server after SIGKILL: it ends itself, a few seconds later.
        most = 30 if number == signal.SIGKILL else 15
        _, left = psutil.wait_procs(family, timeout=most - (time.monotonic() - asked))
        assert left == []
    finally:
        for one in [process, *family]:
            if isinstance(one, subprocess.Popen) or one.is_running():
                one.kill()
