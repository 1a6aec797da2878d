"""What a decode step of the Triton kernels writes and reads again: made once for the largest batch, at a fixed address.

Nothing is allocated in a step and grids depend on shapes alone, so that a step can be captured in a CUDA graph. N, H,
G, Hq and D are those of `ops/contract.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Scratch(NamedTuple):
    """What a decode step writes and reads again, shared by all layers; made once for the largest batch.

    kept_out: float32 [N, Hq, splits, D], kept_lse: float32 [N, Hq, splits]: states over parts of the kept tokens.
    evicted_out, evicted_lse: the same over parts of the evicted ones, with splits of their own.
    decision: int32 [N, Hq], PLAIN, MERGE, RECOMPUTE or RECOMPUTE_OR_MERGE.
    similarity: float32 [N, H], of KV heads that want to read their evicted KV; inf of the others.
    Out of a split without tokens, and everything of a row that does not need it, is left as it was.
    """

    kept_out: Tensor
    kept_lse: Tensor
    evicted_out: Tensor
    evicted_lse: Tensor
    decision: Tensor
    similarity: Tensor


# Programs that keep a large GPU busy (the interpreter runs them one after the other), and the most splits of one (row,
# KV head) pair, whatever the batch.
PROGRAMS = 8 if triton.knobs.runtime.interpret else 512
MAX_SPLITS = 32
# Evicted tokens are split at least so often: usually few of the pairs read, and those few have to fill the bus alone.
EVICTED_SPLITS = 1 if triton.knobs.runtime.interpret else 8


def splits_for(rows: int, kv_heads: int) -> int:
    """Splits of each (row, KV head) pair's kept tokens: a power of two.

    By the size of the batch alone, never by lengths: a split takes the same share of however many tokens a row has.
    """
    wanted = PROGRAMS // max(1, rows * kv_heads)
    return min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def evicted_splits_for(rows: int, kv_heads: int) -> int:
    """Splits of each (row, KV head) pair's evicted tokens: at least EVICTED_SPLITS, as few pairs read at a time."""
    return max(EVICTED_SPLITS, splits_for(rows, kv_heads))


def _most(rows: int, kv_heads: int, splits: Callable[[int, int], int]) -> int:
    """Partial states per query head of a KV head of the batch size, up to `rows`, that has the most of them."""
    return max(n * splits(n, kv_heads) for n in range(1, rows + 1)) * kv_heads


def scratch_bytes(rows: int, kv_heads: int, group: int, head_dim: int) -> int:
    """Bytes of `make_scratch` for any batch of up to `rows` rows."""
    states = _most(rows, kv_heads, splits_for) + _most(rows, kv_heads, evicted_splits_for)
    return group * 4 * (states * (head_dim + 1) + rows * kv_heads) + 4 * rows * kv_heads


def make_scratch(rows: int, kv_heads: int, group: int, head_dim: int, device: torch.device | str) -> Scratch:
    """Scratch for batches of up to `rows` rows; `view_scratch` gives the part that one batch size uses.

    Its tensors are flat here: [rows x Hq x splits x D] is largest for some batch size below `rows`.
    """
    kept = _most(rows, kv_heads, splits_for) * group
    evicted = _most(rows, kv_heads, evicted_splits_for) * group
    return Scratch(
        kept_out=torch.empty(kept * head_dim, dtype=torch.float32, device=device),
        kept_lse=torch.empty(kept, dtype=torch.float32, device=device),
        evicted_out=torch.empty(evicted * head_dim, dtype=torch.float32, device=device),
        evicted_lse=torch.empty(evicted, dtype=torch.float32, device=device),
        decision=torch.empty(rows * kv_heads * group, dtype=torch.int32, device=device),
        similarity=torch.empty(rows * kv_heads, dtype=torch.float32, device=device),
    )


def view_scratch(scratch: Scratch, rows: int, kv_heads: int, group: int, head_dim: int, splits: int = 0) -> Scratch:
    """The scratch of a batch of `rows` rows, as `Scratch` says. splits: of both, not above theirs; 0: theirs."""
    heads = kv_heads * group
    kept = (rows, heads, splits or splits_for(rows, kv_heads))
    evicted = (rows, heads, splits or evicted_splits_for(rows, kv_heads))
    return Scratch(
        kept_out=scratch.kept_out[: math.prod(kept) * head_dim].view(*kept, head_dim),
        kept_lse=scratch.kept_lse[: math.prod(kept)].view(kept),
        evicted_out=scratch.evicted_out[: math.prod(evicted) * head_dim].view(*evicted, head_dim),
        evicted_lse=scratch.evicted_lse[: math.prod(evicted)].view(evicted),
        decision=scratch.decision[: rows * heads].view(rows, heads),
        similarity=scratch.similarity[: rows * kv_heads].view(rows, kv_heads),
    )
