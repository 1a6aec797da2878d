"""What is done to one layer's state table outside of a set's own kernels: states put, heads refused, decisions counted.

Shapes: N rows, H KV heads, G query heads per KV head, D head_dim. The columns of the counters are `records.COUNTERS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Decision
from vllm_calidrop.ops.contract import State
from vllm_calidrop.records import COUNTERS

SKIPPED, NONFINITE = COUNTERS.index("skipped"), COUNTERS.index("nonfinite")


def store_state(state: State, slot: int, query: Tensor, evicted: AttentionState) -> None:
    """Put one sequence's state over its evicted tokens into slot `slot`; query: [H, G, D]."""
    state.query[slot] = query
    state.out[slot] = evicted.out
    state.lse[slot] = evicted.lse


def refuse_heads(state: State, slot: int, heads: Tensor) -> None:
    """KV heads bool [H] of a slot have no evicted KV to read. Their query becomes NaN, which is similar to none and
    unlike none, so the gate neither recomputes nor merges."""
    state.query[slot].masked_fill_(heads[:, None, None], torch.nan)
    state.out[slot].masked_fill_(heads[:, None, None], 0)
    state.lse[slot].masked_fill_(heads[:, None], -torch.inf)
    state.counts[slot, NONFINITE] += heads.sum()


def count_decision(state: State, slots: Tensor, decision: Decision) -> None:
    """Add one step's decisions [N, H, G] of distinct `slots` int64 [N]."""
    heads = decision.recompute.shape[1] * decision.recompute.shape[2]
    recomputes = decision.recompute.sum((1, 2))
    merges = decision.merge.sum((1, 2))
    reads = decision.recompute.any(-1).sum(-1)
    columns = torch.stack((recomputes, merges, heads - recomputes - merges, reads), dim=-1)
    state.counts[slots, : columns.shape[-1]] += columns
    if decision.skipped is not None:
        state.counts[slots, SKIPPED] += decision.skipped.sum(-1)


def count_looks(
    state: State, slots: Tensor, looks: Tensor, merges: Tensor, pages: Tensor, skipped: Tensor | None
) -> None:
    """The same for recall by pages: looks bool [N, H], merges bool [N, H, G], pages read int64 [N, H], pages skipped
    int64 [N] (None without a read budget).

    A look is a recomputation of every query head of the group; a head that merges has something stored or buffered to
    merge; a group read is a look that read a page.
    """
    group = merges.shape[-1]
    recomputed, merged = looks.sum(-1) * group, merges.sum((1, 2))
    plain = looks.shape[1] * group - recomputed - merged
    columns = (recomputed, merged, plain, (pages > 0).sum(-1), pages.sum(-1))
    state.counts[slots, : len(columns)] += torch.stack(columns, dim=-1)
    if skipped is not None:
        state.counts[slots, SKIPPED] += skipped
