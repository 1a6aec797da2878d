"""The Triton kernels without a GPU: right under Triton's interpreter, and compiled for the GPUs they are meant for.

Triton decides when it is imported whether it interprets, so each half runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(interpret: str, *command: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def test_under_the_interpreter() -> None:
    run("1", "-m", "pytest", "tests/kernels", "-q", "-x", "-p", "no:cacheprovider")
