"""The swap pool in host memory, where the evicted KV of one worker lies (scheduler/ids.py says who owns its blocks)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import CODECS, Codec, codec_of, number_of
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK

# Blocks of each KV head that are encoded, some at a time, so that copies stay small.
BLOCKS_AT_ONCE = 4
# What blocks are moved by: torch moves what it indexes element by element.
WORD = torch.int64


@dataclass
class Part:
    """Some swap blocks of one sequence and layer on their way into the pool.

    tokens: the evicted tokens they hold, a slice of the run. block_ids: where they go. out: where they are filled in,
    uint8 [blocks, H, block_bytes], beside the KV cache.
    """

    tokens: slice
    block_ids: tuple[int, ...]
    out: Tensor


def part_of(first: int, block_ids: tuple[int, ...], tokens: int, codec: Codec, out: Tensor) -> Part:
    """The part of a run of `tokens` tokens that begins with its block number `first`."""
    start = first * codec.tokens_per_block
    return Part(slice(start, min(tokens, start + len(block_ids) * codec.tokens_per_block)), block_ids, out)


class SwapPool:
    """Evicted KV of one worker.

    memory: uint8 [layers, num_blocks, KV heads, block_bytes]. A block of a KV head holds tokens of one run, encoded by
    the run's codec: any free block serves any codec. pages: the same memory as codec `none` has it, [layers,
    num_blocks, KV heads, pages per block, 2 (K, V), PAGE_TOKENS, head_dim] in the cache's dtype, so that a page of a KV
    head is one contiguous run. Evicted tokens of a head lie in position order; each has its own.
    Memory is reserved once and becomes resident when first written. codecs: by their numbers. device_pages: `pages` as
    the KV cache's device sees them, the same memory.
    """

    def __init__(self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.codecs = tuple(codec_of(name, head_dim, dtype) for name in CODECS)
        shape = (num_layers, num_blocks, num_kv_heads)
        self.memory = torch.empty((*shape, self.codecs[0].block_bytes), dtype=torch.uint8)
        self.pages = self.memory.view(dtype).view(*shape, PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim)
        self.device_pages = self.pages

    @staticmethod
    def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * num_kv_heads * codec_of("none", head_dim, dtype).block_bytes

    def parts(self, block_ids: tuple[int, ...], tokens: int, codec: Codec) -> Iterator[Part]:
        """The blocks of a run of `tokens` evicted tokens, some at a time. Fill the `out` of each, then `send` it."""
        for first in range(0, len(block_ids), BLOCKS_AT_ONCE):
            some = block_ids[first : first + BLOCKS_AT_ONCE]
            out = self.memory.new_empty((len(some), *self.memory.shape[2:]))
            yield part_of(first, some, tokens, codec, out)

    def send(self, layer: int, part: Part) -> None:
        """Put a filled part where it belongs."""
        self.memory.view(WORD)[layer, torch.tensor(part.block_ids)] = part.out.view(WORD)

    def join(self) -> None:
        """From here on the operators see everything that was sent."""

    def close(self) -> None:
        """Give back what is not freed with this object. Idempotent."""

    def write(
        self, layer: int, block_ids: tuple[int, ...], keys: Tensor, values: Tensor, codec: str = "none"
    ) -> Tensor:
        """Store evicted KV [H, m, D], on the host already; block_ids: as many as the codec needs for m tokens.

        Returns bool [H]: the KV heads whose KV the codec refuses (`Encoded.refused`).
        """
        encoding = self.codecs[number_of(codec)]
        refused = torch.zeros(len(keys), dtype=torch.bool)
        for part in self.parts(block_ids, keys.shape[1], encoding):
            encoded = encoding.encode(keys[:, part.tokens], values[:, part.tokens])
            part.out.copy_(encoded.blocks.transpose(0, 1))
            self.send(layer, part)
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
