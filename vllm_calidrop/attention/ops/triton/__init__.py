"""The GPU operators in Triton (docs/gpu.md). Nothing of vLLM: `contract.py` says what they are called with.

Decode: `decode_step` = `decode_kept`, `reload_evicted`, `merge_row`. Under TRITON_INTERPRET=1 they run on CPU tensors.
"""

from __future__ import annotations

from vllm_calidrop.attention.ops.triton.contract import (
    KVCache,
    Rows,
    Scratch,
    Sequences,
    State,
    make_scratch,
    scratch_bytes,
    splits_for,
    view_scratch,
)
from vllm_calidrop.attention.ops.triton.decode import decode_kept
from vllm_calidrop.attention.ops.triton.merge import merge_row
from vllm_calidrop.attention.ops.triton.reload import reload_evicted
from vllm_calidrop.attention.ops.triton.step import decode_step

__all__ = [
    "KVCache",
    "Rows",
    "Scratch",
    "Sequences",
    "State",
    "decode_kept",
    "decode_step",
    "make_scratch",
    "merge_row",
    "reload_evicted",
    "scratch_bytes",
    "splits_for",
    "view_scratch",
]
