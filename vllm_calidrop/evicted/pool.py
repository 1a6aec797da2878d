"""The CPU swap pool: who owns its blocks (ledger, scheduler's process) and where the KV lies (pool, each worker)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import NAMES, codec_of, number_of
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK

# Blocks of each KV head that are encoded before they are stored.
BLOCKS_AT_ONCE = 4
# What blocks are moved by: torch moves what it indexes element by element.
WORD = torch.int64


class SwapLedger:
    """Free list of a pool's ids. A swap block is a fixed number of bytes of every layer and KV head, on all ranks.

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

    memory: uint8 [layers, num_blocks, KV heads, block_bytes]. A block of a KV head holds tokens of one run, encoded by
    the run's codec: any free block serves any codec. pages: the same memory as codec `none` has it, [layers,
    num_blocks, KV heads, pages per block, 2 (K, V), PAGE_TOKENS, head_dim] in the cache's dtype, so that a page of a KV
    head is one contiguous run. Evicted tokens of a head lie in position order; each has its own.
    Memory is reserved once and becomes resident when first written. codecs: by their numbers.
    """

    def __init__(self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.codecs = tuple(codec_of(name, head_dim, dtype) for name in NAMES)
        shape = (num_layers, num_blocks, num_kv_heads)
        self.memory = torch.empty((*shape, self.codecs[0].block_bytes), dtype=torch.uint8)
        self.pages = self.memory.view(dtype).view(*shape, PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim)

    @staticmethod
    def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * num_kv_heads * codec_of("none", head_dim, dtype).block_bytes

    def write(self, layer: int, block_ids: Tensor, keys: Tensor, values: Tensor, codec: str = "none") -> Tensor:
        """Store evicted KV [H, m, D] in blocks `block_ids` (int64, as many as the codec needs for m tokens).

        Returns bool [H]: the KV heads whose KV the codec refuses (`Encoded.refused`).
        """
        encoding = self.codecs[number_of(codec)]
        refused = torch.zeros(len(keys), dtype=torch.bool)
        tokens = BLOCKS_AT_ONCE * encoding.tokens_per_block
        parts = (block_ids.split(BLOCKS_AT_ONCE), keys.split(tokens, dim=1), values.split(tokens, dim=1))
        for ids, some_keys, some_values in zip(*parts, strict=True):
            encoded = encoding.encode(some_keys, some_values)
            self.memory.view(WORD)[layer, ids] = encoded.blocks.view(WORD).transpose(0, 1)
            refused |= encoded.refused
        return refused

    def read(self, layer: int, block_ids: Tensor, kv_heads: Tensor, codec: int = 0) -> tuple[Tensor, Tensor]:
        """K and V [N, T, D] of N (sequence, KV head) pairs; block_ids: int64 [N, blocks], kv_heads: int64 [N].

        T = blocks * tokens_per_block of the codec with this number; the caller masks what lies beyond a pair's own
        tokens.
        """
        blocks = self.memory.view(WORD)[layer][block_ids, kv_heads[:, None]].view(torch.uint8)
        keys, values = self.codecs[codec].decode(blocks.flatten(0, 1))
        return keys.reshape(len(kv_heads), -1, keys.shape[-1]), values.reshape(len(kv_heads), -1, values.shape[-1])

    def read_pages(self, layer: int, block_ids: Tensor, kv_heads: Tensor, pages: Tensor, codec: int = 0) -> Tensor:
        """Some pages alone: [X, 2 (K, V), PAGE_TOKENS, D].

        block_ids, kv_heads: int64 [X]; pages: int64 [X], the page's number inside its block.
        """
        memory = self.memory[layer]
        first_bytes = (block_ids * memory.shape[1] + kv_heads) * memory.shape[2]
        return self.codecs[codec].decode_pages(memory.flatten(), first_bytes, pages)
