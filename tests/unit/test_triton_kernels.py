"""The Triton kernels without a GPU: right under Triton's interpreter, and compiled for the GPUs they are meant for.

Triton decides when it is imported whether it interprets, so each half runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(interpret: str, *command: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ids=lambda file: file.stem)
def test_under_the_interpreter(file: Path) -> None:
    run("1", "-m", "pytest", str(file), "-q", "-x", "-p", "no:cacheprovider")


COMPILED = """
from benchmarks.kernels.resources import CAPABILITIES, SHARED_LIMIT, SHAPES, all_launches, resources
import torch

for name, dtype in CHOSEN:
    for launch in all_launches(SHAPES[name], getattr(torch, dtype)):
        if name != "Llama-3-8B" and launch.kernel.__name__ not in ("decode_kernel", "reload_kernel"):
            continue
        for capability in CAPABILITIES:
            found = resources(launch, capability)
            print(name, dtype, *found)
            assert found.stack == 0, found
            assert found.registers <= 168 and found.shared <= SHARED_LIMIT[capability] // 2, found
"""
# (b)'s and (a)'s shapes: head_dim 64, 96, 128, 256, groups 1, 4, 16.
CHOSEN = [
    ("Llama-3-8B", "bfloat16"), ("Llama-3-8B", "float16"), ("Llama-2-7B", "bfloat16"), ("Llama-3.2-1B", "bfloat16"),
    ("Phi-3-mini", "bfloat16"), ("Gemma-7B", "float16"), ("16 heads a group, head_dim 256", "bfloat16"),
]  # fmt: skip


def test_compiled_without_spills() -> None:
    """Two blocks and more fit a multiprocessor, and nothing is spilled to local memory."""
    out = run("0", "-c", COMPILED.replace("CHOSEN", repr(CHOSEN)))
    print(out)
    assert len(out.splitlines()) == 2 * (2 * 11 + 5 * 2), out
