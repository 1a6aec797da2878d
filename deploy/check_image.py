"""Lints the Dockerfile, and tries its cpu target without a Docker engine, step by step, in clean Debian roots.

    python -m deploy.check_image                          # hadolint
    sudo python -m deploy.check_image --try /var/tmp/image   # and the trial: as root, with debootstrap, 8 GB

The trial builds each stage in a root of its own (debootstrap in place of the Python image) and runs its RUN steps
there. Then it starts the entry point as the image's user, in process, mount and network namespaces of its own (it is
process 1 and reaches nothing outside), waits for the health check, asks for a completion with a budget, and stops it in
the middle of a stream. What it does not show: the image format, layers, the gpu target.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dockerfile import (
    ROOT,
    Stage,
    copy_of,
    ignore_lines,
    is_ignored,
    read_stages,
    replace_variables,
    variables_of,
)

PYTHON_PACKAGES = "python3,python3-dev,python3-venv,python-is-python3,ca-certificates"
HEALTH_SECONDS, STOP_SECONDS = 600, 10  # docker stop waits 10 s

ASK = """
import json, sys, urllib.request
def ask(**fields):
    body = {"model": "smooth", "prompt": list(range(10, 500)), "temperature": 0, "ignore_eos": True} | fields
    request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)
answer = json.load(ask(max_tokens=8, kv_budget=64))
report = answer["calidrop"][0]
assert (report["kept"], report["mode"]) == (64, "calidrop"), answer
print(json.dumps(report), flush=True)
stream = ask(max_tokens=600, kv_budget=64, stream=True)
print("streaming", stream.readline().decode().strip()[:60], flush=True)
rest = stream.read().decode().strip().splitlines()
print("stream ended with", rest[-1], flush=True)
finish = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest if line.startswith("data: {")]
assert rest[-1] == "data: [DONE]" and finish[-1] in ("length", "abort"), rest[-3:]
"""


def lint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, "--config", ROOT / "deploy/hadolint.yaml", ROOT / "Dockerfile"], check=True)


@dataclass
class Trial:
    """folder: where the roots lie; again: as an earlier trial left them. shared: files and folders of this machine that
    RUN steps see (a package index's folder, certificates). passed: variables of this machine for RUN steps (pip's).
    """

    folder: Path
    mirror: str | None
    shared: list[Path] = field(default_factory=list)
    passed: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    again: bool = False

    def __post_init__(self) -> None:
        self.stages = read_stages(arguments=self.arguments)

    def base(self) -> Path:
        """A minimal Debian with Python 3.11, made once."""
        root = self.folder / "base"
        if not (root / "made").exists():
            shutil.rmtree(root, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={PYTHON_PACKAGES}", "bookworm", str(root)]
            command = ["unshare", "--mount", *command, *([self.mirror] if self.mirror else [])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (root / "made").touch()
        return root

    def build(self, name: str) -> tuple[Path, dict[str, str]]:
        """The root of a stage and its environment, after all of its steps."""
        stage, root = self.stages[name], self.folder / name
        if not self.again:
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", "--reflink=auto", self.base(), root], check=True)
            shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        arguments: dict[str, str] = {}
        workdir, user = "/", "0"
        for instruction, value in stage.steps:
            if not self.again:
                print(f"{name}: {instruction} {' '.join(value.split())[:100]}", flush=True)
            if instruction == "ARG":
                arguments |= {key: text for key, text in variables_of(value).items() if text}
            elif instruction == "ENV":
                environment |= {k: replace_variables(v, environment) for k, v in variables_of(value).items()}
            elif instruction == "WORKDIR":
                workdir = value
                (root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "USER":
                user = value
            elif instruction == "COPY" and not self.again:
                self.copy(root, workdir, value)
            elif instruction == "RUN" and not self.again:
                variables = environment | arguments | self.passed
                inside(root, ["/bin/sh", "-c", value], variables, user, workdir, self.shared)
        return root, environment

    def copy(self, root: Path, workdir: str, value: str) -> None:
        origin, sources, destination = copy_of(value)
        if origin is not None and not (self.folder / origin / "built").exists():
            built, _ = self.build(origin)
            (built / "built").touch()
        source_root = ROOT if origin is None else self.folder / origin
        target = root / (Path(workdir) / destination).relative_to("/")
        lines = ignore_lines()
        for source in sources:
            path = source_root / source.lstrip("/")
            into = target / path.name if destination.endswith("/") and not path.is_dir() else target
            into.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                skip = None if origin else lambda folder, names: ignored_in(folder, names, lines)
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=skip)
            else:
                shutil.copy(path, into)

    def serve(self, stage: Stage, root: Path, environment: dict[str, str]) -> None:
        """Start it as `docker run` would, wait until it is healthy, ask, stop it while it streams."""
        words = [word for name in ("ENTRYPOINT", "CMD") for word in json.loads(stage.last(name) or "[]")]
        user, workdir = stage.last("USER") or "0", stage.last("WORKDIR") or "/"
        health = json.loads((stage.last("HEALTHCHECK") or "").partition("CMD ")[2])
        variables = environment | {"HOME": workdir, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = namespaced(root, words, variables, user, workdir, [], alone=True)
        log = self.folder / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            server = wait_for_child(process)
            enter = ["nsenter", "--target", str(server), "--net", *chroot(root, variables, user, workdir)]
            started = time.monotonic()
            while subprocess.run([*enter, *health], capture_output=True).returncode:
                assert process.poll() is None and time.monotonic() < started + HEALTH_SECONDS, log.read_text()[-4000:]
                time.sleep(2)
            print(f"healthy after {time.monotonic() - started:.0f} s, as user", owner_of(server), flush=True)
            with subprocess.Popen([*enter, "python", "-c", ASK], stdout=subprocess.PIPE, text=True) as asking:
                assert asking.stdout is not None
                for line in asking.stdout:
                    print(line.rstrip(), flush=True)
                    if line.startswith("streaming"):
                        os.kill(server, getattr(signal, stage.last("STOPSIGNAL") or "SIGTERM"))
                        stopping = time.monotonic()
            assert asking.returncode == 0, log.read_text()[-4000:]
            process.wait(timeout=STOP_SECONDS)
            print(f"stopped after {time.monotonic() - stopping:.1f} s with status {process.returncode}", flush=True)
            assert process.returncode == 0, log.read_text()[-4000:]
        finally:
            process.kill()


def ignored_in(folder: str, names: list[str], lines: list[str]) -> set[str]:
    relative = Path(folder).relative_to(ROOT)
    return {name for name in names if is_ignored(str(relative / name), lines)}


def inside(
    root: Path, command: Sequence[str], variables: dict[str, str], user: str, workdir: str, shared: Sequence[Path]
) -> None:
    subprocess.run(namespaced(root, command, variables, user, workdir, shared), check=True)


def chroot(root: Path, variables: dict[str, str], user: str, workdir: str) -> list[str]:
    """The command that runs what follows it in `root` with exactly these variables; it replaces itself by it."""
    changed = ["chroot", f"--userspec={user}:{user}", str(root), "/usr/bin/env", "--ignore-environment"]
    return [*changed, f"--chdir={workdir}", *(f"{name}={value}" for name, value in variables.items())]


def namespaced(
    root: Path,
    command: Sequence[str],
    variables: dict[str, str],
    user: str,
    workdir: str,
    shared: Sequence[Path],
    alone: bool = False,
) -> list[str]:
    """In namespaces of its own, so that mounts and processes end with it. alone: with no network but loopback."""
    mounts = [
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /sys {root}/sys",
        f"mount -t tmpfs tmpfs {root}/dev/shm",
    ]
    for path in shared:
        place = root / path.relative_to("/")
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        mounts.append(f"mount --bind {path} {place}")
    if alone:
        mounts.append("ip link set lo up")
    run = shlex.join([*chroot(root, variables, user, workdir), *command])
    flags = ["--mount", "--pid", "--fork", "--kill-child", *(["--net"] if alone else [])]
    return ["unshare", *flags, "sh", "-c", " && ".join([*mounts, f"exec {run}"])]


def wait_for_child(process: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(100):
        found = children.read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.1)
    raise AssertionError("the entry point did not start")


def owner_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--try", dest="folder", type=Path, help="run the cpu target's steps in roots under this folder")
    made.add_argument("--mirror", help="Debian mirror for debootstrap")
    made.add_argument(
        "--share", type=Path, action="append", default=[], help="a path of this machine RUN steps may read"
    )
    made.add_argument("--pass-env", action="append", default=[], metavar="NAME", help="a variable for RUN steps")
    made.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument("--again", action="store_true", help="serve from the roots that an earlier trial built")
    given = made.parse_args()
    lint()
    print("hadolint: nothing to say")
    if given.folder is None:
        return
    trial = Trial(
        given.folder.resolve(),
        given.mirror,
        given.share,
        {name: os.environ[name] for name in given.pass_env},
        variables_of(" ".join(given.build_arg)),
        given.again,
    )
    trial.folder.mkdir(parents=True, exist_ok=True)
    root, environment = trial.build("cpu")
    trial.serve(trial.stages["cpu"], root, environment)


if __name__ == "__main__":
    main()
