"""What every operator set is called with: tensors by name and shape, indexed by state slot. Nothing is computed here.

Shapes: N rows of a step, S state slots, L layers, H KV heads, G query heads per KV head, Hq = H * G, D head_dim, bs the
block size of the tables (the kernel block size, where vLLM splits its blocks), C columns of a block table, W swap
blocks of a sequence at most, B places of a page buffer at most.

A *row* is one decoding sequence in a batch; a *state slot* is its place in the tables for as long as it runs. Only
`Rows` changes from step to step. Everything is read where it lies, by the kernels themselves: a step gathers nothing,
allocates nothing and needs no value on the host, so it can be captured in a CUDA graph and replayed with other
contents.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """The rows of a step, int32.

    slot: [N], the state slot; -1 is a row of plain vLLM (full KV, attended from token 0, without calibration).
    token: [N], the index of the row's query in `query` and of its answer in `out`.
    end: [N], the tokens known, the current one included (vLLM's seq_lens). 0 is padding: nothing is read or written for
        such a row, whatever its other entries hold.
    block_table: [N, C], stride(1) == 1, with columns from token 0 on (vLLM's own). Columns below start // bs and from
        ceil(end / bs) on are never read: they may hold anything.
    """

    slot: Tensor
    token: Tensor
    end: Tensor
    block_table: Tensor


# `Sequences.most_reads` of a sequence without a read budget.
NO_BUDGET = 1 << 30


class Sequences(NamedTuple):
    """What holds for a sequence until it ends, by state slot; written when it is admitted.

    start: int32 [S], the first attended token, P - B, in the numbering of `Rows.end` and of the block table's columns.
    stored: int32 [S], evicted tokens per KV head in the swap pool that the gate decides about; 0 where there is no
        calibration state, and where pages are recalled (`Recall.stored` has the number then).
    theta1, theta2: float32 [S]. gate: int32 [S], values of `calibration.Gate`.
    swap_blocks: int32 [S, W], stride(1) == 1; entries beyond the blocks of the stored tokens are never read.
    codec: int32 [S], numbers of codecs. most_reads: int32 [S], KV heads (with recall: pages) that a layer may read in a
        step, those of lowest similarity first, ties to the lower head; NO_BUDGET: all.
    layouts: int32 [codecs, fields], `evicted/codecs/__init__.py::layout_table`; not by slot.

    Slots of different rows of a step are distinct.
    """

    start: Tensor
    stored: Tensor
    theta1: Tensor
    theta2: Tensor
    gate: Tensor
    swap_blocks: Tensor
    codec: Tensor
    most_reads: Tensor
    layouts: Tensor


class Recall(NamedTuple):
    """How a sequence recalls pages, by state slot (docs/recall.md).

    stored: int32 [S], evicted tokens per KV head in the swap pool that are recalled by pages; 0: this one does not.
    theta, eps, top_p: float32 [S], the look gate, the smallest share of a wanted page, and the share to be covered
    (NaN: by number alone). most, buffer_size: int32 [S], pages of a look and places of the page buffer. rest: int32
    [S], bits per channel of the coded values that unread tokens are attended with; 0: those tokens are ignored.
    sketch_blocks: int32 [S, W], buffer_ids: int32 [S, B], both with stride(1) == 1.
    """

    stored: Tensor
    theta: Tensor
    eps: Tensor
    top_p: Tensor
    most: Tensor
    buffer_size: Tensor
    rest: Tensor
    sketch_blocks: Tensor
    buffer_ids: Tensor


class State(NamedTuple):
    """One layer of the state table (worker/state_table.py), contiguous, and its counters.

    query: [S, H, G, D], dtype of the queries; out: float32 [S, H, G, D]; lse: float32 [S, H, G].
    counts: int64 [S, len(COUNTERS)] of this layer, stride(1) == 1.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    counts: Tensor


class KVCache(NamedTuple):
    """One layer's paged cache as two views of [blocks, H, bs, D] with any strides: the layout is in the strides alone.

    vLLM on CUDA has K and V of a token side by side in the last dimension, token-major or head-major.
    """

    key: Tensor
    value: Tensor
