"""The CUDA backend inside the real engine, without a GPU: interpreted kernels, either model runner; a process each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.cases import ROOT
from vllm_calidrop.ops.flavour import FLAVOUR_VARIABLE
from vllm_calidrop.ops.registry import CHOICE_VARIABLE

pytestmark = pytest.mark.engine


def identities(runner: str, layout: str, operators: str = "auto") -> list[str]:
    """What the run said was equal, under model runner "1" (V2, the default on GPUs) or "0" (V1).

    layout: of the KV cache, "NHD" (tokens outside, vLLM's choice) or "HND". operators: which set serves.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "v2_runner"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": runner,
        "VLLM_KV_CACHE_LAYOUT": layout,
        FLAVOUR_VARIABLE: "cuda",
        CHOICE_VARIABLE: operators,
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.cuda_identity"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return [line for line in run.stdout.splitlines() if line.endswith(": equal")]


def test_the_cuda_backend_under_the_v2_model_runner() -> None:
    assert identities("1", "NHD") == ["triton against the reference: equal", "captured metadata: equal"]


@pytest.mark.full
def test_the_cuda_backend_under_the_v1_model_runner() -> None:
    assert identities("0", "HND") == ["triton against the reference: equal"]


def test_the_cuda_backend_with_operators_in_torch() -> None:
    """A set of another kind behind the same backend, which also takes head-major caches."""
    assert identities("1", "HND", "reference") == [
        "reference against the reference: equal",
        "captured metadata: equal",
    ]
