"""Tests of the Triton kernels on CPU tensors, under Triton's interpreter; tests/unit/test_triton_kernels.py runs them.

Triton decides when it is imported whether it interprets, so they need a process of their own:
    TRITON_INTERPRET=1 python -m pytest tests/kernels
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run with TRITON_INTERPRET=1")
