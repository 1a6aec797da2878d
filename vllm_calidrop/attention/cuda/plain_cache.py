"""One layer of vLLM's paged cache on CUDA, in terms of tokens. The layout is in the tensor's strides."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.attention.ops.triton import KVCache


class PlainCache:
    """kv_cache: [blocks, H, block_size, 2 * D], K and V of a token side by side in the last dimension."""

    def __init__(self, kv_cache: Tensor) -> None:
        self.num_kv_heads, self.block_size = kv_cache.shape[1:3]
        self.head_dim = kv_cache.shape[3] // 2
        self.tensor = kv_cache

    @property
    def views(self) -> KVCache:
        return KVCache(self.tensor[..., : self.head_dim], self.tensor[..., self.head_dim :])

    def read(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [H, tokens, D] of the first tokens of a block table (integer [columns]); copies."""
        columns = -(-tokens // self.block_size)
        kv = self.tensor[blocks[:columns].long()].transpose(0, 1).flatten(1, 2)[:, :tokens]
        return kv[..., : self.head_dim], kv[..., self.head_dim :]

    def write(self, keys: Tensor, values: Tensor, blocks: Tensor, first: int) -> None:
        """Store K and V [H, n, D] at positions first, first + 1, ... of a block table; a head's tokens are its own."""
        position = torch.arange(first, first + keys.shape[1], device=keys.device)
        block = blocks[position // self.block_size].long()
        kv = torch.cat((keys, values), dim=-1).transpose(0, 1)
        self.tensor[block, :, position % self.block_size] = kv.to(self.tensor.dtype)
