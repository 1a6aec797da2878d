"""The contract of a codec: how a KV head's evicted tokens lie in swap blocks, and how they come back.

A codec is bound to a head_dim and the cache's dtype. A swap block of one (layer, KV head) is a fixed number of bytes,
the same for every codec; the codec says how many tokens, in whole pages, it holds. So any free block serves any codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.layout import Layout
from vllm_calidrop.evicted.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS, pages_for

# Magnitudes from here on are refused like inf and NaN: their ranges and products would not be finite in float32.
LARGEST = 1e18


class Encoded(NamedTuple):
    """What a run of evicted tokens becomes.

    blocks: uint8 [H, number of blocks, block_bytes]; refused: bool [H], KV heads whose run holds NaN, inf or more than
    LARGEST (their blocks are those of zeros and must not be read).
    """

    blocks: Tensor
    refused: Tensor


class Codec(ABC):
    """One way to store evicted KV. Stateless; its names are in `codecs/__init__.py`.

    name: the `kv_codec` it is chosen by. head_dim, dtype: of the KV cache.
    """

    name: ClassVar[str]

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.head_dim = head_dim
        self.dtype = dtype
        self.block_bytes = SWAP_BLOCK_TOKENS * 2 * head_dim * dtype.itemsize

    @property
    @abstractmethod
    def tokens_per_block(self) -> int:
        """Tokens of one KV head that a block holds; a multiple of PAGE_TOKENS, and at least SWAP_BLOCK_TOKENS."""

    @property
    @abstractmethod
    def page_read_bytes(self) -> int:
        """Bytes of reading one page alone, with all that is needed to decode it."""

    @abstractmethod
    def run_bytes(self, tokens: int) -> int:
        """Bytes of reading a run of `tokens` evicted tokens of one KV head, metadata and outlier tokens included."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Encode a run of evicted K and V [H, T, D] in the cache's dtype, on their device, which is not waited for."""

    @abstractmethod
    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [N, tokens_per_block, D] of blocks uint8 [N, block_bytes]; anything beyond a run's last token."""

    @abstractmethod
    def decode_pages(self, memory: Tensor, first_bytes: Tensor, pages: Tensor) -> Tensor:
        """Some pages alone: [X, 2 (K, V), PAGE_TOKENS, D].

        memory: uint8 [B], with blocks that begin at first_bytes int64 [X]; pages: int64 [X], the page inside its block.
        """

    def kernel_layout(self) -> Layout | None:
        """The layout by which kernels read the blocks themselves; None if `decode` must do it first.

        It is None for every head_dim and dtype, or for none. Operator sets without a way to decode first refuse a codec
        that has no layout.
        """
        return None

    def check(self) -> None:
        """ValueError, with the codec's name, where its sizes or its layout cannot be right."""
        faults = []
        tokens, layout = self.tokens_per_block, self.kernel_layout()
        if tokens < SWAP_BLOCK_TOKENS or tokens % PAGE_TOKENS:
            faults.append(f"tokens_per_block {tokens}: not a multiple of {PAGE_TOKENS} from {SWAP_BLOCK_TOKENS} on")
        if layout is not None:
            faults += layout.faults(self.head_dim, self.dtype.itemsize, self.block_bytes)
            if layout.pages_per_block != self.pages_per_block:
                faults.append(f"pages_per_block {layout.pages_per_block}, but a block holds {tokens} tokens")
        if faults:
            raise ValueError(f"the codec {self.name} (head_dim {self.head_dim}, {self.dtype}): {'; '.join(faults)}")

    @property
    def pages_per_block(self) -> int:
        return self.tokens_per_block // PAGE_TOKENS

    def blocks_for(self, tokens: int) -> int:
        """Swap blocks that hold `tokens` evicted tokens of every KV head."""
        return -(-tokens // self.tokens_per_block)

    def bytes_per_token(self, tokens: int) -> float:
        """Bytes per token of a long run, as it is read; tokens: the run's length."""
        return self.run_bytes(tokens) / tokens

    @staticmethod
    def page_count(tokens: int) -> int:
        return pages_for(tokens)


def gather_runs(memory: Tensor, first_bytes: Tensor, count: int) -> Tensor:
    """`count` bytes from each place on: uint8 [X, count] of memory uint8 [B], first_bytes int64 [X]."""
    return memory[first_bytes[:, None] + torch.arange(count)]
