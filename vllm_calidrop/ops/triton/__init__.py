"""The GPU operators in Triton (docs/gpu.md). Nothing of vLLM: `contract.py` says what they are called with.

A decode step of a layer: `decode_step` = (a) `decode_kept`, (b) `reload_evicted` and, of encoded KV, `reload_encoded`,
(c) `merge_row`. A prompt: (d) `add_column_sums` scores it; (e) `copy_evicted`, `calibrate`, `gather_kept`,
`scatter_kept` compact it, in this order.
Under TRITON_INTERPRET=1 they run on CPU tensors.
"""

from __future__ import annotations

from vllm_calidrop.ops.contract import NO_BUDGET, KVCache, Rows, Sequences, State
from vllm_calidrop.ops.numbers import RECOMPUTE
from vllm_calidrop.ops.triton.calibrate import calibrate
from vllm_calidrop.ops.triton.compact import copy_evicted, gather_kept, scatter_kept
from vllm_calidrop.ops.triton.decode import decode_kept
from vllm_calidrop.ops.triton.encoded import reload_encoded
from vllm_calidrop.ops.triton.merge import merge_row
from vllm_calidrop.ops.triton.operators import decode_step
from vllm_calidrop.ops.triton.reload import reload_evicted
from vllm_calidrop.ops.triton.score import add_column_sums, score_scratch_elements
from vllm_calidrop.ops.triton.scratch import Scratch, make_scratch, scratch_bytes, splits_for, view_scratch

__all__ = [
    "NO_BUDGET",
    "RECOMPUTE",
    "KVCache",
    "Rows",
    "Scratch",
    "Sequences",
    "State",
    "add_column_sums",
    "calibrate",
    "copy_evicted",
    "decode_kept",
    "decode_step",
    "gather_kept",
    "make_scratch",
    "merge_row",
    "reload_encoded",
    "reload_evicted",
    "scatter_kept",
    "score_scratch_elements",
    "scratch_bytes",
    "splits_for",
    "view_scratch",
]
