"""Compiles the C++ operators at first use and keeps the result in the user's cache directory.

No torch headers and no Python ones: the library has a C interface, so it depends on the compiler, the CPU and the
OpenMP runtime that torch has loaded, and builds in a few seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from vllm_calidrop.ops import numbers

logger = logging.getLogger("vllm.calidrop")

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno")
# The first that the compiler takes: what this CPU has, under the names of x86 and of Arm, or else its baseline.
TARGETS = (("-march=native",), ("-mcpu=native",), ())
TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """The operators could not be compiled here."""


def library(cache: Path | None = None) -> Path:
    """The compiled operators: from the cache, or compiled now (by one process; the others wait)."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (CXX, c++, g++, clang++)")
    folder = cache or cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"operators-{_key(compiler)}.so"
        if target.exists():
            return target
        with (folder / f"{target.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error
    return target


def find_compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_calidrop"


def _compile(compiler: str, target: Path) -> None:
    """Compile into a file of its own, which is then moved, so that nobody ever loads half a library."""
    started = time.monotonic()
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    failure = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        (Path(folder) / "numbers.h").write_text(numbers.header())
        for machine in TARGETS:
            command = [compiler, *FLAGS, *machine, f"-I{folder}", *sources, "-o", str(built)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            if run.returncode == 0:
                built.replace(target)
                logger.info("CaliDrop: compiled the CPU operators in %.0f s: %s", time.monotonic() - started, target)
                return
            failure = failure or run.stderr.strip()
    raise BuildError(f"{compiler} failed: {failure[-2000:]}")


def _key(compiler: str) -> str:
    """Hash of all that decides what comes out: sources, flags, compiler, CPU, torch (its OpenMP runtime)."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(numbers.header().encode())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    for part in (*FLAGS, str(TARGETS), compiler, version, torch.__version__, platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """The CPU's instruction sets, because a cache directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
