"""A prompt in a paged cache that is NaN elsewhere, for the kernels that score and compact it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.cases import STRANGE, Shape, layouts


class Prompt:
    """A prompt of `tokens` tokens in a cache that is NaN elsewhere, with columns beyond it that do not exist."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        torch.manual_seed(tokens)
        self.shape, self.tokens, self.scale = shape, tokens, shape.head_dim**-0.5
        bs = shape.block_size
        columns = -(-tokens // bs)
        self.cache = layouts(columns + 2, shape.kv_heads, bs, shape.head_dim, shape.dtype, shape.layout)
        self.blocks = torch.full((columns + 3,), STRANGE, dtype=torch.int32)
        self.blocks[:columns] = torch.randperm(columns + 2)[:columns]
        self.keys, self.values = torch.randn((2, shape.kv_heads, tokens, shape.head_dim)).to(shape.dtype)
        position = torch.arange(tokens)
        blocks = self.blocks[position // bs].long()
        self.cache.key[blocks, :, position % bs] = self.keys.transpose(0, 1)
        self.cache.value[blocks, :, position % bs] = self.values.transpose(0, 1)

    def queries(self, count: int) -> Tensor:
        return torch.randn((count, self.shape.kv_heads * self.shape.group, self.shape.head_dim)).to(self.shape.dtype)

    def read(self, cache: Tensor, first: int, end: int) -> Tensor:
        position = torch.arange(first, end)
        bs = self.shape.block_size
        return cache[self.blocks[position // bs].long(), :, position % bs].transpose(0, 1)

    def choose(self, count: int) -> tuple[Tensor, Tensor]:
        """Ascending positions per KV head: `count` of them, and the rest."""
        order = torch.stack([torch.randperm(self.tokens) for _ in range(self.shape.kv_heads)])
        return order[:, :count].sort(-1).values, order[:, count:].sort(-1).values
