"""The calibration state table: per running sequence and layer what was computed over its evicted tokens, and when."""

from __future__ import annotations

import torch

from vllm_calidrop.ops.contract import State
from vllm_calidrop.records import COUNTERS


class StateTable:
    """`C_q`, `C_out`, `C_lse` of Algorithm 1, and the decision counters.

    Shapes: L layers, S slots, H KV heads, G query heads per KV head, D head_dim.
    query: [L, S, H, G, D] model dtype (a copy of a query, so nothing is lost); out: [L, S, H, G, D] float32;
    lse: [L, S, H, G] float32; counts: int64 [S, L, len(COUNTERS)] since the slot's admission. layers: the same memory,
    layer by layer. device: None: the host.
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
        self.counts = torch.zeros((num_slots, num_layers, len(COUNTERS)), dtype=torch.int64, device=device)
        self.layers = tuple(
            State(self.query[layer], self.out[layer], self.lse[layer], self.counts[:, layer])
            for layer in range(num_layers)
        )

    def admit(self, slot: int) -> None:
        """A new sequence takes the slot: nothing is evicted yet, nothing is counted."""
        self.query[:, slot] = 0
        self.out[:, slot] = 0
        self.lse[:, slot] = -torch.inf
        self.counts[slot] = 0
