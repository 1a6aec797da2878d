"""The matrix: every registered policy, codec, gate and recall rule on every device's path (registered.py).

Whoever registers a policy or a codec has it covered by that. A process each, because more is registered there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.engine.cases import ROOT
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.ops.flavour import FLAVOUR_VARIABLE
from vllm_calidrop.ops.registry import CHOICE_VARIABLE

pytestmark = pytest.mark.engine


def served_and_refused(how: str, **environment: str) -> tuple[int, int]:
    """Combinations that equal the reference, and those refused with the setting's name."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.registered", how],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert re.search(r"full KV: \d+ policies equal", run.stdout)
    found = re.search(r"combinations: (\d+) equal, (\d+) refused by name", run.stdout)
    assert found is not None, run.stdout
    return int(found[1]), int(found[2])


def test_every_pair_by_the_compiled_operators() -> None:
    served, refused = served_and_refused("pairs", **{CHOICE_VARIABLE: "cpp"})
    assert served >= 4 * (len(CODECS) + 1) and refused == 0


def test_every_value_by_the_reference_operators() -> None:
    served, refused = served_and_refused("values", **{CHOICE_VARIABLE: "reference"})
    assert served == len(CODECS) + 1 and refused == 0


def test_every_value_by_the_kernels_of_a_gpu() -> None:
    """Interpreted, under the model runner that GPUs have; recall by pages and codecs without a layout are refused."""
    path = os.pathsep.join([str(ROOT / "tests" / "support" / "v2_runner"), str(ROOT)])
    served, refused = served_and_refused(
        "values",
        PYTHONPATH=path,
        TRITON_INTERPRET="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_KV_CACHE_LAYOUT="NHD",
        **{FLAVOUR_VARIABLE: "cuda"},
    )
    assert served == len(CODECS) and refused >= 2
