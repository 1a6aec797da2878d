"""vLLM's V2 model runner, the default on GPUs, on CPU under Triton's interpreter; needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.cases import ROOT

pytestmark = pytest.mark.engine


def test_identities_under_the_v2_model_runner() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "v2_runner"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.v2_identity"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    said = [line for line in run.stdout.splitlines() if line.endswith(": equal")]
    assert said == [f"{what}: equal" for what in ("stock", "theta1 = 2", "reference", "prefix hit", "preemption")]
