"""The calibration state table: per running sequence and layer what was computed over its evicted tokens, and when."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Decision
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.worker.measures import similarity_histogram

SKIPPED, NONFINITE = COUNTERS.index("skipped"), COUNTERS.index("nonfinite")


class StateTable:
    """`C_q`, `C_out`, `C_lse` of Algorithm 1, and the decision counters.

    Shapes: L layers, S slots, H KV heads, G query heads per KV head, D head_dim.
    query: [L, S, H, G, D] model dtype (a copy of a query, so nothing is lost); out: [L, S, H, G, D] float32;
    lse: [L, S, H, G] float32; counts: int64 [S, L, len(COUNTERS)] since the slot's admission. similarity: int64, of all
    decisions since the start, counted by the CPU operators (measures.py). device: None: the host.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, num_slots, num_kv_heads, group)
        self.query = torch.zeros((*shape, head_dim), dtype=dtype, device=device)
        self.out = torch.zeros((*shape, head_dim), dtype=torch.float32, device=device)
        self.lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        self.similarity = similarity_histogram()
        self.counts = torch.zeros((num_slots, num_layers, len(COUNTERS)), dtype=torch.int64, device=device)

    @staticmethod
    def slot_bytes(num_layers: int, num_query_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        per_head = head_dim * dtype.itemsize + head_dim * 4 + 4
        return num_layers * (num_query_heads * per_head + len(COUNTERS) * 8)

    def admit(self, slot: int) -> None:
        """A new sequence takes the slot: nothing evicted yet, nothing counted."""
        self.query[:, slot] = 0
        self.out[:, slot] = 0
        self.lse[:, slot] = -torch.inf
        self.counts[slot] = 0

    def put(self, layer: int, slot: int, query: Tensor, state: AttentionState) -> None:
        """Store the state of one sequence; query [H, G, D]."""
        self.query[layer, slot] = query
        self.out[layer, slot] = state.out
        self.lse[layer, slot] = state.lse

    def count(self, layer: int, slots: Tensor, decision: Decision) -> None:
        """Add one step's decisions [N, H, G] of distinct `slots` [N]."""
        heads = decision.recompute.shape[1] * decision.recompute.shape[2]
        recomputes = decision.recompute.sum((1, 2))
        merges = decision.merge.sum((1, 2))
        reads = decision.recompute.any(-1).sum(-1)
        columns = torch.stack((recomputes, merges, heads - recomputes - merges, reads), dim=-1)
        self.counts[slots, layer, : columns.shape[-1]] += columns
        if decision.skipped is not None:
            self.counts[slots, layer, SKIPPED] += decision.skipped.sum(-1)

    def refuse(self, layer: int, slot: int, heads: Tensor) -> None:
        """KV heads bool [H] that have no evicted KV to read: a query of NaN is similar to none and unlike none, so
        the gate neither recomputes nor merges."""
        self.query[layer, slot].masked_fill_(heads[:, None, None], torch.nan)
        self.out[layer, slot].masked_fill_(heads[:, None, None], 0)
        self.lse[layer, slot].masked_fill_(heads[:, None], -torch.inf)
        self.counts[slot, layer, NONFINITE] += heads.sum()

    def count_recall(
        self, layer: int, slots: Tensor, looks: Tensor, merges: Tensor, pages: Tensor, skipped: Tensor | None = None
    ) -> None:
        """The same for recall by pages: looks bool [N, H], merges bool [N, H, G], pages read int64 [N, H], pages
        skipped int64 [N].

        A look is a recomputation of every query head of the group; a head that merges has something stored or
        buffered to merge; a group read is a look that read a page.
        """
        group = merges.shape[-1]
        recomputed, merged = looks.sum(-1) * group, merges.sum((1, 2))
        plain = looks.shape[1] * group - recomputed - merged
        columns = (recomputed, merged, plain, (pages > 0).sum(-1), pages.sum(-1))
        self.counts[slots, layer, : len(columns)] += torch.stack(columns, dim=-1)
        if skipped is not None:
            self.counts[slots, layer, SKIPPED] += skipped
