"""Which of the two backends serves this process: by vLLM's platform, and in tests by a variable."""

from __future__ import annotations

import os

# `cuda` on vLLM's CPU platform: the CUDA backend over CPU tensors, its kernels under Triton's interpreter. For tests.
FLAVOUR_VARIABLE = "VLLM_CALIDROP_FLAVOUR"


def uses_cuda_flavour() -> bool:
    from vllm.platforms import current_platform

    chosen = os.environ.get(FLAVOUR_VARIABLE, "")
    if chosen not in ("", "cuda"):
        raise ValueError(f"{FLAVOUR_VARIABLE} must be 'cuda' or unset, got {chosen!r}")
    if current_platform.is_cuda():
        return True
    if chosen and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{FLAVOUR_VARIABLE}=cuda without a GPU is for tests, with TRITON_INTERPRET=1")
    return bool(chosen)


def is_on_gpu() -> bool:
    """Whether the KV cache lies in memory of its own, not in the host's."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())
