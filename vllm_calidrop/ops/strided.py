"""vLLM's paged cache where strides alone say where a token lies (CUDA): views, and reads and writes in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.ops.contract import KVCache


def kv_views(kv_cache: Tensor) -> KVCache:
    """kv_cache: [blocks, H, block_size, 2 * D], K and V of a token side by side in the last dimension."""
    head_dim = kv_cache.shape[-1] // 2
    return KVCache(kv_cache[..., :head_dim], kv_cache[..., head_dim:])


class StridedCache:
    """The same as `packed.py::PackedCache` for such a cache: reads and writes of one layer in terms of tokens."""

    def __init__(self, kv_cache: Tensor) -> None:
        self.num_kv_heads, self.block_size = kv_cache.shape[1:3]
        self.views = kv_views(kv_cache)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [N, H, columns * block_size, D] of block tables `blocks` [N, columns] (integer)."""
        key, value = (view[blocks.long()].transpose(1, 2).flatten(2, 3) for view in self.views)
        return key, value

    def take(self, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [H, n, D] of one sequence's tokens at positions `index` [H, n]: every KV head has its own."""
        head = torch.arange(self.num_kv_heads, device=index.device)[:, None]
        block, within = blocks[index // self.block_size].long(), index % self.block_size
        key, value = (view[block, head, within] for view in self.views)
        return key, value

    def put(self, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        """Store K and V [H, n, D] as the tokens first_position, first_position + 1, ... of one sequence."""
        position = torch.arange(first_position, first_position + keys.shape[1], device=blocks.device)
        block, within = blocks[position // self.block_size].long(), position % self.block_size
        for view, written in zip(self.views, (keys, values), strict=True):
            view[block, :, within] = written.transpose(0, 1)
