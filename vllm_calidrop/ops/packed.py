"""Where a token's K and V elements lie inside a block of vLLM's CPU cache.

The CPU kernels pack a (block, KV head) region of 2 * block_size * head_dim elements their own way (vec: K transposed;
amx: K and V in VNNI order). The offsets are found by writing numbered tokens through vLLM's own operator, so they are
exact for whatever layout the installed kernels use.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops

# Numbers are written in base 128: integers up to 256 are exact in every dtype of the cache.
_BASE = 128
# Tokens of each KV head whose elements' places, eight bytes each, are held at once.
_TAKEN_AT_ONCE = 512


class BlockOffsets(NamedTuple):
    """int64 [block_size, head_dim]: offset of every element inside the flat (block, KV head) region."""

    key: Tensor
    value: Tensor


@cache
def block_offsets(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> BlockOffsets:
    """The layout of kernel family `isa`, probed once per process and checked to be a bijection."""
    if isa == "amx":
        torch.cpu._init_amx()
    elements = 2 * block_size * head_dim
    numbers = torch.arange(elements).view(2, block_size, head_dim)
    found = torch.zeros(elements, dtype=torch.int64)
    digits = 1
    while _BASE**digits < elements:
        digits += 1
    for digit in range(digits):
        written = (numbers // _BASE**digit % _BASE).to(dtype)
        region = torch.zeros((1, 1, 2 * block_size, head_dim), dtype=dtype)
        key_cache, value_cache = region.chunk(2, dim=2)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(
            written[0].unsqueeze(1).contiguous(),
            written[1].unsqueeze(1).contiguous(),
            key_cache,
            value_cache,
            slots,
            isa,
        )
        found += region.flatten().to(torch.int64) * _BASE**digit
    if not torch.equal(found.sort().values, torch.arange(elements)):
        raise RuntimeError(
            f"the CPU cache layout {isa!r} (block {block_size}, head_dim {head_dim}, {dtype}) cannot be probed"
        )
    offset_of_number = torch.empty_like(found)
    offset_of_number[found] = torch.arange(elements)
    key, value = offset_of_number.view(2, block_size, head_dim)
    return BlockOffsets(key.contiguous(), value.contiguous())


class PackedCache:
    """Reads and writes of one layer's cache in terms of tokens.

    kv_cache: vLLM's tensor [blocks, H, block_size, 2 * head_dim], contiguous within a block.
    """

    def __init__(self, kv_cache: Tensor, isa: str) -> None:
        num_blocks, self.num_kv_heads, self.block_size, width = kv_cache.shape
        num_kv_heads = self.num_kv_heads
        self.head_dim = width // 2
        self.isa = isa
        self.tensor = kv_cache
        self._regions = kv_cache.view(num_blocks, num_kv_heads, -1)
        self._key_cache, self._value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * self.block_size, -1).chunk(
            2, dim=2
        )
        self.offsets = block_offsets(isa, self.block_size, self.head_dim, kv_cache.dtype)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [N, H, columns * block_size, D] of block tables `blocks` [N, columns] (integer)."""
        regions = self._regions[blocks.long()]
        return tuple(
            regions[..., offsets.flatten()]
            .unflatten(-1, (self.block_size, self.head_dim))
            .transpose(1, 2)
            .flatten(2, 3)
            for offsets in self.offsets
        )

    def take(self, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [H, n, D] of one sequence's tokens at positions `index` [H, n], which every KV head has its own of.

        blocks: its block table, integer [columns].
        """
        shape = (*index.shape, self.head_dim)
        taken = tuple(self.tensor.new_empty(shape) for _ in self.offsets)
        head = torch.arange(self.num_kv_heads)[:, None, None]
        for first in range(0, index.shape[1], _TAKEN_AT_ONCE):
            some = index[:, first : first + _TAKEN_AT_ONCE]
            block = blocks[some // self.block_size].long().unsqueeze(-1)
            for out, offsets in zip(taken, self.offsets, strict=True):
                out[:, first : first + some.shape[1]] = self._regions[block, head, offsets[some % self.block_size]]
        return taken[0], taken[1]

    def put(self, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        """Store K and V [H, n, D] as the tokens first_position, first_position + 1, ... of one sequence."""
        position = torch.arange(first_position, first_position + keys.shape[1])
        slots = blocks[position // self.block_size].long() * self.block_size + position % self.block_size
        keys, values = (x.transpose(0, 1).contiguous() for x in (keys, values))
        ops.cpu_attn_reshape_and_cache(keys, values, self._key_cache, self._value_cache, slots, self.isa)
