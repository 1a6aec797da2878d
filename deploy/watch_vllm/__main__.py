"""`python -m deploy.watch_vllm`: what the newest vLLM changes in the symbols that this package touches.

Without arguments it asks the package index for the newest release. If that one is tested, nothing is left to say; if
not, its wheel is downloaded and compared with the manifest of the newest tested release. Exit status 1: there is a
release that has not been tested. The wheel is read and never imported, so no other environment is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from vllm_calidrop.compat import TESTED_VLLM

from . import manifest
from .source import Source
from .touched import derived_classes, touched


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.watch_vllm", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="a wheel of vLLM instead of the newest one of the index")
    parser.add_argument("--since", default=TESTED_VLLM[-1], help="the release to compare with (%(default)s)")
    what = "write the manifest of this release, from --wheel or else from the vLLM that is installed here"
    parser.add_argument("--write", metavar="VERSION", help=what)
    given = parser.parse_args()
    if given.write:
        place = given.wheel or Path(sysconfig.get_path("purelib"))
        manifest.write(given.write, manifest.describe(Source(place), touched()))
        return 0
    wheel, version = given.wheel, None
    if wheel is None:
        version = newest_version()
        if version in TESTED_VLLM:
            print(f"vLLM {version} is the newest release, and it is tested.")
            return 0
        wheel = download(version)
    version = version or wheel.name.split("-")[1]
    return report(Source(wheel), version, given.since)


def newest_version() -> str:
    """What `pip install vllm` would take now; pip reads the metadata only."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
    command = [*pip, "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-", "vllm"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found: str = answer["install"][0]["metadata"]["version"]
    return found


def download(version: str) -> Path:
    """The wheel of this release, some hundred megabytes, into the user's cache."""
    target = Path.home() / ".cache" / "vllm_calidrop" / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--dest", str(target), f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(target.glob(f"vllm-{version}-*.whl"))


def report(source: Source, version: str, since: str) -> int:
    """Print what differs from the manifest of `since`; the exit status."""
    old = manifest.read(since)
    new = manifest.describe(source, manifest.files_of(old))
    changes = manifest.compare(old, new)
    derived = derived_classes()
    for title, breaks in (("Our code cannot work as it was:", True), ("To be read:", False)):
        chosen = [change for change in changes if change.breaks is breaks]
        if chosen:
            print(f"\n{title}")
        for change in chosen:
            print(f"  {change.symbol.replace(':', '.')}: {change.what}")
            print(f"      needed by {', '.join(change.files)}")
            demanded = set(new[change.symbol].get("abstract", [])) - set(old[change.symbol].get("abstract", []))
            for file, cls, defined in derived.get(change.symbol, []) if demanded else []:
                lacks = sorted(demanded - set(defined))
                print(f"      {cls} in {file} " + (f"lacks {', '.join(lacks)}" if lacks else "has it"))
    broken = sum(change.breaks for change in changes)
    print(
        f"\nFrom vLLM {since} to {version}: {len(old)} symbols compared, {broken} differences that break code and "
        f"{len(changes) - broken} to be read."
    )
    if version in TESTED_VLLM:
        return 0
    print(f"vLLM {version} has not been tested with this package (tested: {', '.join(TESTED_VLLM)}).")
    return 1


if __name__ == "__main__":
    sys.exit(main())
