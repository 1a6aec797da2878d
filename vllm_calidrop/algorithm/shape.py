"""The numbers of a model that the sizes of everything follow from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVShape:
    """One rank's share of a model: heads are those of this rank, head_dim and dtype those of its KV cache."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one KV head in one layer, in the cache's dtype."""
        return 2 * self.head_dim * self.dtype.itemsize
