"""The Dockerfile as data: its stages, with variables put in, and what each copies from the repository."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Stage:
    """One FROM and what follows. steps: (instruction, value) in order; variables are replaced in all but RUN."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        return next((value for name, value in reversed(self.steps) if name == instruction), None)

    def copies(self) -> list[tuple[str | None, list[str], str]]:
        """(stage copied from or None for the repository, sources, destination) of each COPY."""
        return [copy_of(value) for name, value in self.steps if name == "COPY"]


def copy_of(value: str) -> tuple[str | None, list[str], str]:
    words = shlex.split(value)
    flags = [word for word in words if word.startswith("--")]
    assert all(flag.startswith("--from=") for flag in flags), f"COPY {value}: a flag this does not know"
    *sources, destination = [word for word in words if not word.startswith("--")]
    return (flags[0].removeprefix("--from=") if flags else None), sources, destination


def variables_of(value: str) -> dict[str, str]:
    """`A=b C="d e"` of an ENV or ARG; without `=` the value is empty."""
    return {name: text for name, _, text in (word.partition("=") for word in shlex.split(value))}


def replace_variables(value: str, known: Mapping[str, str]) -> str:
    return VARIABLE.sub(lambda found: known.get(found[1] or found[2], ""), value)


def read_stages(path: Path = ROOT / "Dockerfile", arguments: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """arguments: build arguments, as with --build-arg. ENV values may name PATH, which stays `$PATH`."""
    with tempfile.TemporaryDirectory() as folder:
        # The parser wants a file that it may write to.
        (Path(folder) / "Dockerfile").write_bytes(path.read_bytes())
        lines = DockerfileParser(path=folder, env_replace=False).structure
    stages: dict[str, Stage] = {}
    before_from: dict[str, str] = {}
    known: dict[str, str] = {}
    stage = None
    for line in lines:
        name, value = line["instruction"], line["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            base, _, alias = replace_variables(value, before_from).partition(" AS ")
            stage = Stage(alias.strip() or str(len(stages)), base.strip())
            stages[stage.name] = stage
            known = {}
        elif name == "ARG":
            given = {key: (arguments or {}).get(key, text) for key, text in variables_of(value).items()}
            if stage is None:
                before_from |= given
            else:
                known |= given
                stage.steps.append((name, " ".join(f"{key}={shlex.quote(text)}" for key, text in given.items())))
        else:
            assert stage is not None, f"{name} before FROM"
            if name != "RUN":
                value = replace_variables(value, known | {"PATH": "$PATH"})
            if name == "ENV":
                known |= variables_of(value)
            stage.steps.append((name, value))
    return stages


def is_ignored(path: str, lines: list[str]) -> bool:
    """Whether .dockerignore keeps `path` out: the last line that matches it, or a folder above it, decides."""
    folders = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    ignored = False
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        wanted = any(fnmatch.fnmatchcase(folder, pattern) for folder in folders)
        anywhere = line.startswith("**/") and any(fnmatch.fnmatchcase(part, pattern) for part in Path(path).parts)
        if wanted or anywhere:
            ignored = not line.startswith("!")
    return ignored


def ignore_lines(path: Path = ROOT / ".dockerignore") -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
