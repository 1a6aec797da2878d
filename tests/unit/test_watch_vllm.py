"""`python -m deploy.watch_vllm`: what it sees in a release, what it calls a difference, and the committed manifests."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy.watch_vllm import __main__ as command
from deploy.watch_vllm import manifest
from deploy.watch_vllm.source import Source
from deploy.watch_vllm.touched import ROOT
from vllm_calidrop.compat import TESTED_VLLM, installed_vllm_version

BASE = """
from abc import ABC, abstractmethod

if True:
    LIMIT: int = 4

class Root(ABC):
    @abstractmethod
    def must(self): ...

    @abstractmethod
    def also(self): ...

class Base(Root):
    def must(self): ...

    def step(self, output: int, *, fast=False):
        '''Says what it does.'''
        return output  # at once
"""
FILES = {
    "vllm/__init__.py": "from .base import Base as Exported\n",
    "vllm/base.py": BASE,
    "vllm/below.py": "from vllm.base import Base\n\nclass Below(Base):\n    def step(self, output): ...\n",
    "vllm/lower.py": "from vllm import below\nfrom vllm.below import Below\n\nclass Lower(Below):\n    pass\n",
}
NAMES = ("vllm:Exported", "vllm.base:Base.step", "vllm.below:Below.must", "vllm.base:LIMIT", "vllm.base:Gone")
SYMBOLS = {name: ["a.py"] for name in NAMES}


def release(folder: Path, **changed: str) -> Source:
    for name, text in (FILES | {name.replace("__", "/") + ".py": text for name, text in changed.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Source(folder)


def test_what_is_seen_of_a_release(tmp_path: Path) -> None:
    entries = manifest.describe(release(tmp_path), SYMBOLS)
    assert entries["vllm:Exported"] == {"kind": "class", "abstract": ["also"], "used_by": ["a.py"]}
    step = entries["vllm.base:Base.step"]
    assert step["signature"] == "self, output, *, fast=False"
    assert (step["defined_by"], step["overrides"]) == ("vllm.base.Base", ["vllm.below.Below"])
    assert entries["vllm.below:Below.must"]["defined_by"] == "vllm.base.Base", "it is inherited"
    assert entries["vllm.base:LIMIT"]["kind"] == "value"
    assert entries["vllm.base:Gone"] == {"missing": True, "used_by": ["a.py"]}


def test_a_wheel_and_a_folder_are_read_alike(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    folder = tmp_path / "installed"
    folder.mkdir()
    assert manifest.describe(Source(wheel), SYMBOLS) == manifest.describe(release(folder), SYMBOLS)


@pytest.mark.parametrize(
    ("changed", "what", "breaks"),
    [
        ({"vllm__base": BASE.replace("def step", "def walk")}, "gone", True),
        ({"vllm__base": BASE.replace("output: int", "result: int")}, "parameters were", True),
        ({"vllm__base": BASE.replace("*, fast", "timeout, *, fast")}, "parameters were", True),
        ({"vllm__base": BASE.replace("fast=False", "fast=False, slow=True")}, "parameters were", False),
        ({"vllm__base": BASE.replace("return output", "return -output")}, "its code has changed", False),
        ({"vllm__base": BASE.replace("LIMIT: int = 4", "LIMIT: int = 5")}, "its code has changed", False),
        (
            {"vllm__base": BASE.replace("def also(", "def also(self): ...\n\n    @abstractmethod\n    def more(")},
            "must now define more",
            True,
        ),
        ({"vllm__lower": FILES["vllm/lower.py"] + "    def step(self, output): ...\n"}, "vllm.lower.Lower", False),
        ({"vllm__below": FILES["vllm/below.py"].replace("def step", "def walk")}, "no longer overridden", False),
    ],
)
def test_differences(tmp_path: Path, changed: dict[str, str], what: str, breaks: bool) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    old = manifest.describe(release(before), SYMBOLS)
    changes = manifest.compare(old, manifest.describe(release(after, **changed), SYMBOLS))
    (change,) = [change for change in changes if what in change.what]
    assert change.breaks is breaks and change.files == ("a.py",)


def test_comments_docstrings_and_line_breaks_are_no_difference(tmp_path: Path) -> None:
    text = (
        BASE.replace("# at once", "# soon").replace("Says what", "Tells what").replace("output: int,", "output: int,\n")
    )
    old = manifest.describe(release(tmp_path / "before"), SYMBOLS)
    assert manifest.compare(old, manifest.describe(release(tmp_path / "after", vllm__base=text), SYMBOLS)) == []


def test_the_break_of_0_33_is_seen_from_0_32() -> None:
    """An abstract method that no signature shows stopped the first step on a GPU."""
    changes = manifest.compare(manifest.read("0.32.0"), manifest.read("0.33.0"))
    (change,) = [change for change in changes if change.symbol == "vllm.v1.outputs:AsyncModelRunnerOutput"]
    assert change.breaks and "get_kv_connector_output" in change.what
    assert "vllm_calidrop/hooks/engine/pending_output.py" in change.files


def test_every_tested_release_has_its_manifest() -> None:
    assert {path.stem for path in manifest.FOLDER.glob("*.json")} == set(TESTED_VLLM)


def test_the_installed_release_is_what_its_manifest_says() -> None:
    committed = manifest.read(installed_vllm_version().partition("+")[0])
    now = manifest.describe(Source(Path(sysconfig.get_path("purelib"))), manifest.files_of(committed))
    assert now == committed


def test_manifests_name_what_the_package_touches_now() -> None:
    """Otherwise: `python -m deploy.watch_vllm --write VERSION` for every tested release (docs/development.md)."""
    code = (
        "import json; from deploy.watch_vllm.touched import touched;"
        "print(json.dumps({symbol: sorted(files) for symbol, files in touched().items()}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    now = json.loads(run.stdout.splitlines()[-1])
    for version in TESTED_VLLM:
        assert manifest.files_of(manifest.read(version)) == now, version


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest: dict[str, Any] = {"version": TESTED_VLLM[-1]}
    monkeypatch.setattr(command, "newest_version", lambda: newest["version"])
    monkeypatch.setattr(sys, "argv", ["watch_vllm"])
    assert command.main() == 0
    assert "it is tested" in capsys.readouterr().out

    wheel = tmp_path / "vllm-0.99.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
    newest["version"] = "0.99.0"
    monkeypatch.setattr(command, "download", lambda version: wheel)
    assert command.main() == 1
    said = capsys.readouterr().out
    assert "vllm.v1.outputs.AsyncModelRunnerOutput: it is gone" in said
    assert "vllm_calidrop/hooks/engine/pending_output.py" in said and "0.99.0 has not been tested" in said
