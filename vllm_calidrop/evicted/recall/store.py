"""What recall by pages keeps on the device of one worker: sketches, page buffers, and per slot the means and a flag."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.recall.buffer import EMPTY, OLDEST
from vllm_calidrop.evicted.recall.sketch import CHANNELS_PER_BYTE, WORD_BYTES, encode, padded_dim, token_bytes
from vllm_calidrop.records import SequenceRecord


class Sketch(NamedTuple):
    """Sketches of N (sequence, KV head) pairs: codes uint8 [N, T, D' / 4], scales float16 [N, T], mu float32 [N, D]."""

    codes: Tensor
    scales: Tensor
    mu: Tensor


def by_word(codes: Tensor) -> Tensor:
    """Codes [..., T, B] as they are stored: [..., pages, B / 4, PAGE_TOKENS, 4]. T fills its pages."""
    return codes.unflatten(-1, (-1, WORD_BYTES)).unflatten(-3, (-1, PAGE_TOKENS)).transpose(-3, -2)


def by_token(codes: Tensor) -> Tensor:
    """The inverse of `by_word`."""
    return codes.transpose(-3, -2).flatten(-4, -3).flatten(-2)


class RecallStore:
    """L layers, S state slots, H KV heads.

    codes: uint8 [L, sketch blocks, H, PAGES_PER_BLOCK, D' / 16, PAGE_TOKENS, 4]: of a page the first 4 bytes of all its
    tokens, then the next 4, so that a look reads the same 16 channels of 16 tokens at once; scales: float16 [L, sketch
    blocks, H, SWAP_BLOCK_TOKENS]; tokens in the order of the swap blocks. mu: float32 [L, S, H, D]. looked: bool
    [L, S], False until the first decode step. buffer: [L, buffer pages, H, 2 (K, V), PAGE_TOKENS, D] in the cache's
    dtype; of each buffer page and KV head, held: int64 [L, buffer pages, H] (the page of the sequence, EMPTY) and rank
    (0: newest).
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_sketch_blocks: int,
        num_buffer_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        sketched = (num_layers, num_sketch_blocks, num_kv_heads)
        words = padded_dim(head_dim) // (CHANNELS_PER_BYTE * WORD_BYTES)
        self.codes = torch.empty((*sketched, PAGES_PER_BLOCK, words, PAGE_TOKENS, WORD_BYTES), dtype=torch.uint8)
        self.scales = torch.empty((*sketched, SWAP_BLOCK_TOKENS), dtype=torch.float16)
        self.mu = torch.zeros((num_layers, num_slots, num_kv_heads, head_dim), dtype=torch.float32)
        self.looked = torch.zeros((num_layers, num_slots), dtype=torch.bool)
        buffered = (num_layers, num_buffer_pages, num_kv_heads)
        self.buffer = torch.empty((*buffered, 2, PAGE_TOKENS, head_dim), dtype=dtype)
        self.held = torch.full(buffered, EMPTY, dtype=torch.int64)
        self.rank = torch.full(buffered, OLDEST, dtype=torch.int64)

    @staticmethod
    def sketch_block_bytes(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * num_kv_heads * SWAP_BLOCK_TOKENS * token_bytes(head_dim)

    @staticmethod
    def buffer_page_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * num_kv_heads * (2 * PAGE_TOKENS * head_dim * dtype.itemsize + 16)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * (num_kv_heads * head_dim * 4 + 1)

    def admit(self, record: SequenceRecord) -> None:
        """A new sequence takes its slot and buffer pages: no look yet, nothing buffered."""
        self.looked[:, record.slot] = False
        if record.recall is not None:
            self.held[:, record.recall.buffer_ids] = EMPTY
            self.rank[:, record.recall.buffer_ids] = OLDEST

    def put_sketch(self, layer: int, record: SequenceRecord, evicted_keys: Tensor, prompt_keys: Tensor) -> None:
        """Sketch the stored keys [H, m, D] of one layer; mu is the mean of the prompt's keys [H, P, D]."""
        assert record.recall is not None
        blocks = torch.tensor(record.recall.sketch_blocks)
        mu = prompt_keys.float().mean(1)
        codes, scales = encode(evicted_keys, mu)
        padding = len(blocks) * SWAP_BLOCK_TOKENS - evicted_keys.shape[1]
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        codes = by_word(codes).unflatten(1, (len(blocks), -1))
        scales = torch.nn.functional.pad(scales, (0, padding)).unflatten(1, (len(blocks), -1))
        self.codes[layer, blocks] = codes.transpose(0, 1)
        self.scales[layer, blocks] = scales.transpose(0, 1)
        self.mu[layer, record.slot] = mu

    def refuse(self, layer: int, slot: int, heads: Tensor) -> None:
        """KV heads bool [H] whose pages must not be read: estimates are NaN, so no page is ever wanted."""
        self.mu[layer, slot, heads] = torch.nan

    def sketch(self, layer: int, slots: Tensor, blocks: Tensor, kv_heads: Tensor) -> Sketch:
        """Sketches of N pairs; slots, kv_heads: int64 [N]; blocks: int64 [N, W]; T = W * SWAP_BLOCK_TOKENS."""
        where = (blocks, kv_heads.unsqueeze(-1))
        return Sketch(
            by_token(self.codes[layer][where].flatten(1, 2)),
            self.scales[layer][where].flatten(1),
            self.mu[layer, slots, kv_heads],
        )
