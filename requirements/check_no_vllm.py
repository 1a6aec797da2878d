"""Refuses to go on where a real distribution `vllm` is installed: vllm_metadata would take its place."""

import sys
from importlib.metadata import PackageNotFoundError, distribution

try:
    found = distribution("vllm")
except PackageNotFoundError:
    sys.exit(0)
if any(file.parts[0] == "vllm" for file in found.files or ()):
    sys.exit(f"vllm {found.version} is installed here: use it, or another environment (make VENV=...), but not both")
