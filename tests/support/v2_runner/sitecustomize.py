"""Lets vLLM's V2 model runner run on CPU, under Triton's interpreter. For tests only.

vLLM's CPU worker has a V2 runner whose kernels are Triton's, and vLLM uses Triton on CPU only where Triton names a
backend "cpu", which the released wheels do not. With TRITON_INTERPRET=1 no backend is ever asked to compile, so naming
one is enough. Python imports this file at start-up in every process that has its folder on PYTHONPATH, which is how it
comes before vLLM in the engine and worker processes too. It does nothing without TRITON_INTERPRET=1.
"""

import os


class _InterpreterDriver:
    """Stands where vLLM looks for a driver, and is never asked for anything but this."""

    @staticmethod
    def is_active() -> bool:
        return False


def _name_a_cpu_backend() -> None:
    try:
        from triton.backends import Backend, backends
    except ImportError:  # vLLM then says that its V2 runner requires Triton
        return
    backends.setdefault("cpu", Backend(compiler=None, driver=_InterpreterDriver))


if os.environ.get("TRITON_INTERPRET") == "1":
    _name_a_cpu_backend()
