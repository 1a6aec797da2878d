"""One decode step of one layer: Algorithm 2 for all rows of a batch, in four launches."""

from __future__ import annotations

from torch import Tensor

from vllm_calidrop.ops.contract import KVCache, Rows, Sequences, State
from vllm_calidrop.ops.triton.decode import decode_kept
from vllm_calidrop.ops.triton.encoded import reload_encoded
from vllm_calidrop.ops.triton.merge import merge_row
from vllm_calidrop.ops.triton.reload import reload_evicted
from vllm_calidrop.ops.triton.scratch import Scratch


def decode_step(
    query: Tensor, out: Tensor, cache: KVCache, pages: Tensor, rows: Rows, sequences: Sequences, state: State,
    scratch: Scratch, scale: float, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of every row's query, over its kept tokens and by the gate over its evicted ones, into out.

    query: [tokens, Hq, D] and out: [tokens, Hq, D], stride(2) == 1. pages: one layer of the swap pool. lse: float32
    [N, Hq] if wanted. scratch: `view_scratch` for N rows. The launches are ordered by the stream they are put on.
    """
    decode_kept(query, cache, rows, sequences, state, scratch, scale)
    reload_evicted(query, pages, rows, sequences, scratch, scale)
    reload_encoded(query, pages, rows, sequences, scratch, scale)
    merge_row(query, out, rows, sequences, state, scratch, lse)
