"""One tile of an attention with a running log-sum-exp: what decode, reload and calibration have in common.

Everything is in base 2 inside a kernel: logits are scaled by scale * log2(e), and the log-sum-exp is turned back into a
natural logarithm when it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """a [M, K] times b [K, N] in float32. The interpreter multiplies bfloat16 as the integers it is stored in."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend_tile(query, keys_t, values, valid, scale_log2, top, total, acc):  # type: ignore[no-untyped-def]
    """Add a tile of tokens to the running state (top, total, acc).

    query: [M, D]; keys_t: [D, T]; values: [T, D]; valid: bool [T], at least one of them True in the first tile.
    Masked elements of keys and values must be finite (zero). top, total: float32 [M]; acc: float32 [M, D].
    """
    logits = dot(query, keys_t) * scale_log2
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + dot(weights.to(values.dtype), values)
    return new_top, total, acc


@triton.jit
def store_partial(  # type: ignore[no-untyped-def]
    out, lse, top, total, acc, head, part, in_group, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr
):
    """Write the state of a split: out [.., SPLITS, D] and lse [.., SPLITS] of heads `head` int [M]; -inf if empty."""
    d = tl.arange(0, TILE_D)
    place = head * SPLITS + part
    empty = total == 0.0
    log = tl.where(empty, float("-inf"), LN_2 * (top + tl.log2(tl.where(empty, 1.0, total))))
    tl.store(lse + place, log, mask=in_group)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        out + place[:, None] * HEAD_DIM + d[None, :], acc, mask=(in_group & ~empty)[:, None] & (d < HEAD_DIM)[None, :]
    )
