"""Which implementation of the decode step serves a GPU: the Triton kernels, or xFormers."""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor

from vllm_calidrop.ops.triton.contract import KVCache, Rows, Scratch, Sequences, State

# `triton`, also what `auto` and unset mean; `xformers`: slower, allocates in every step, never in a CUDA graph.
CHOICE_VARIABLE = "VLLM_CALIDROP_GPU_OP"
CHOICES = ("auto", "triton", "xformers")


class DecodeStep(Protocol):
    def __call__(
        self, query: Tensor, out: Tensor, cache: KVCache, pages: Tensor, rows: Rows, sequences: Sequences,
        state: State, scratch: Scratch, scale: float, lse: Tensor | None = None,
    ) -> None: ...  # fmt: skip


def choice() -> str:
    """`triton` or `xformers`, from the environment."""
    chosen = os.environ.get(CHOICE_VARIABLE, "auto")
    if chosen not in CHOICES:
        raise ValueError(f"{CHOICE_VARIABLE} must be one of {', '.join(CHOICES)}, got {chosen!r}")
    return "triton" if chosen == "auto" else chosen


def decode_step_op() -> DecodeStep:
    """The decode step of one layer. ImportError where what was chosen is not installed."""
    if choice() == "xformers":
        from vllm_calidrop.ops import xformers

        return xformers.decode_step
    from vllm_calidrop.ops.triton import decode_step

    return decode_step
