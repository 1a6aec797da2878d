"""Packages that benchmarks need beyond what `make install` brings."""

from __future__ import annotations

from importlib.util import find_spec


def need(*modules: str) -> None:
    """Ends the program with one sentence where a module of `modules` is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"this command needs {', '.join(name.replace('_', '-') for name in missing)}: `make install-dev` brings "
            "all that benchmarks need, and so does the extra `bench` (pip install 'vllm-calidrop[bench]')"
        )
