"""The CUDA backend inside the real engine, without a GPU: V2 model runner, interpreted kernels; its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.cases import ROOT
from vllm_calidrop.flavour import FLAVOUR_VARIABLE

pytestmark = pytest.mark.engine


def test_the_cuda_backend_equals_the_reference() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "v2_runner"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        FLAVOUR_VARIABLE: "cuda",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.v2_cuda"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    said = [line for line in run.stdout.splitlines() if line.endswith(": equal")]
    assert said == ["reference: equal"]
