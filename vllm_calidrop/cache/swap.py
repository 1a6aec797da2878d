"""The CPU swap pool: who owns its blocks (ledger, scheduler's process) and where the KV lies (pool, each worker)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.cache.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS


class SwapLedger:
    """Free list of a pool's ids. A swap block is SWAP_BLOCK_TOKENS tokens of every layer and KV head, on all ranks.

    The pools of recall by pages (sketch blocks, buffer pages) are owned the same way.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` ids, or None when there are fewer."""
        if count > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, block_ids: tuple[int, ...]) -> None:
        self._free.extend(reversed(block_ids))
        assert len(self._free) <= self.num_blocks


class SwapPool:
    """Evicted KV of one worker.

    pages: [layers, num_blocks, KV heads, pages per block, 2 (K, V), PAGE_TOKENS, head_dim] in the cache's dtype, so
    that a page of a KV head is one contiguous run. Evicted tokens of a head lie in position order; each has its own.
    Memory is reserved once and becomes resident when first written.
    """

    def __init__(self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.pages = torch.empty(
            (num_layers, num_blocks, num_kv_heads, PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim), dtype=dtype
        )

    @staticmethod
    def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * num_kv_heads * SWAP_BLOCK_TOKENS * 2 * head_dim * dtype.itemsize

    def write(self, layer: int, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store evicted KV [H, m, D] in blocks `block_ids` (int64 [ceil(m / SWAP_BLOCK_TOKENS)])."""
        heads, tokens, head_dim = keys.shape
        padded = block_ids.numel() * SWAP_BLOCK_TOKENS
        kv = keys.new_zeros((heads, 2, padded, head_dim))
        kv[:, 0, :tokens] = keys
        kv[:, 1, :tokens] = values
        kv = kv.view(heads, 2, block_ids.numel(), -1, PAGE_TOKENS, head_dim)
        self.pages[layer, block_ids] = kv.permute(2, 0, 3, 1, 4, 5)

    def read(self, layer: int, block_ids: Tensor, kv_heads: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [N, T, D] of N (sequence, KV head) pairs; block_ids: int64 [N, blocks], kv_heads: int64 [N].

        T = blocks * SWAP_BLOCK_TOKENS; the caller masks what lies beyond a pair's own tokens.
        """
        pages = self.pages[layer][block_ids, kv_heads[:, None]]
        pages = pages.permute(3, 0, 1, 2, 4, 5).flatten(2, 4)
        return pages[0], pages[1]

    def read_pages(self, layer: int, block_ids: Tensor, kv_heads: Tensor, pages: Tensor) -> Tensor:
        """Some pages, one contiguous run each: [X, 2 (K, V), PAGE_TOKENS, D].

        block_ids, kv_heads: int64 [X]; pages: int64 [X], the page's number inside its block.
        """
        return self.pages[layer][block_ids, kv_heads, pages]
