"""What recall by pages keeps on the device of one worker: sketches, coded values, page buffers, vectors per slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.recall.balance import balance_of
from vllm_calidrop.evicted.recall.buffer import EMPTY, OLDEST
from vllm_calidrop.evicted.recall.memory import place_bytes, vector_bytes
from vllm_calidrop.evicted.recall.sketch import CHANNELS_PER_BYTE, WORD_BYTES, encode, padded_dim, token_bytes
from vllm_calidrop.evicted.recall.values import BITS, encode_values, value_bytes
from vllm_calidrop.records import SequenceRecord


class Sketch(NamedTuple):
    """Sketches of N (sequence, KV head) pairs: codes uint8 [N, T, D' / 4], scales float16 [N, T], mu float32 [N, D],
    and balance float32 [N, D], ones for pairs without a rest."""

    codes: Tensor
    scales: Tensor
    mu: Tensor
    balance: Tensor


class CodedValues(NamedTuple):
    """Coded values of N pairs: codes uint8 [N, P, D', 2 bits], scales float16 [N, T], mu float32 [N, D]."""

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
    """L layers, S state slots, H KV heads. rest: the richest `kv_recall_rest` that sketch blocks have room for.

    codes: uint8 [L, sketch blocks, H, PAGES_PER_BLOCK, D' / 16, PAGE_TOKENS, 4]: of a page the first 4 bytes of all its
    tokens, then the next 4, so that a look reads the same 16 channels of 16 tokens at once; scales: float16 [L, sketch
    blocks, H, SWAP_BLOCK_TOKENS]; tokens in the order of the swap blocks. mu: float32 [L, S, H, D]. looked: bool
    [L, S], False until the first decode step. buffer: [L, buffer pages, H, 2 (K, V), PAGE_TOKENS, D] in the cache's
    dtype; of each buffer page and KV head, held: int64 [L, buffer pages, H] (the page of the sequence, EMPTY) and rank
    (0: newest). value_codes: uint8 [L, sketch blocks, H, PAGES_PER_BLOCK, bytes], the codes of values.py, of which `v1`
    uses the first half where the room is that of `v2`; value_scales: like scales. balance, value_mu: like mu. Without a
    rest these four are empty.
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
        rest: str = "none",
    ) -> None:
        sketched = (num_layers, num_sketch_blocks, num_kv_heads)
        words = padded_dim(head_dim) // (CHANNELS_PER_BYTE * WORD_BYTES)
        self.codes = torch.empty((*sketched, PAGES_PER_BLOCK, words, PAGE_TOKENS, WORD_BYTES), dtype=torch.uint8)
        self.scales = torch.empty((*sketched, SWAP_BLOCK_TOKENS), dtype=torch.float16)
        self.mu = torch.zeros((num_layers, num_slots, num_kv_heads, head_dim), dtype=torch.float32)
        slots = (num_layers, num_slots if BITS[rest] else 0, num_kv_heads, head_dim)
        self.balance, self.value_mu = (torch.zeros(slots, dtype=torch.float32) for _ in range(2))
        of_page = padded_dim(head_dim) * 2 * BITS[rest]
        self.value_codes = torch.empty((*sketched, PAGES_PER_BLOCK, of_page), dtype=torch.uint8)
        of_block = SWAP_BLOCK_TOKENS if BITS[rest] else 0
        self.value_scales = torch.empty((*sketched, of_block), dtype=torch.float16)
        self.looked = torch.zeros((num_layers, num_slots), dtype=torch.bool)
        buffered = (num_layers, num_buffer_pages, num_kv_heads)
        self.buffer = torch.empty((*buffered, 2, PAGE_TOKENS, head_dim), dtype=dtype)
        self.held = torch.full(buffered, EMPTY, dtype=torch.int64)
        self.rank = torch.full(buffered, OLDEST, dtype=torch.int64)

    @staticmethod
    def sketch_block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, rest: str) -> int:
        of_token = token_bytes(head_dim) + value_bytes(head_dim, rest)
        return num_layers * num_kv_heads * SWAP_BLOCK_TOKENS * of_token

    @staticmethod
    def buffer_page_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * num_kv_heads * place_bytes(head_dim, dtype)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, rest: str) -> int:
        return num_layers * (num_kv_heads * vector_bytes(head_dim, rest) + 1)

    def admit(self, record: SequenceRecord) -> None:
        """A new sequence takes its slot and buffer pages: no look yet, nothing buffered."""
        self.looked[:, record.slot] = False
        if record.recall is not None:
            self.held[:, record.recall.buffer_ids] = EMPTY
            self.rank[:, record.recall.buffer_ids] = OLDEST

    def put_sketch(
        self,
        layer: int,
        record: SequenceRecord,
        evicted_keys: Tensor,
        prompt_keys: Tensor,
        queries: Tensor | None = None,
    ) -> None:
        """Sketch the stored keys [H, m, D] of one layer; mu is the mean of the prompt's keys [H, P, D].

        queries: [X, Hq, D], the last prompt queries, which balance the sketch of a sequence with a rest.
        """
        assert record.recall is not None
        blocks = torch.tensor(record.recall.sketch_blocks)
        mu, balance = prompt_keys.float().mean(1), None
        if record.recall.rest != "none":
            assert queries is not None
            balance = self.balance[layer, record.slot] = balance_of(queries, prompt_keys, mu)
        codes, scales = encode(evicted_keys, mu, balance)
        padding = len(blocks) * SWAP_BLOCK_TOKENS - evicted_keys.shape[1]
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        codes = by_word(codes).unflatten(1, (len(blocks), -1))
        scales = torch.nn.functional.pad(scales, (0, padding)).unflatten(1, (len(blocks), -1))
        self.codes[layer, blocks] = codes.transpose(0, 1)
        self.scales[layer, blocks] = scales.transpose(0, 1)
        self.mu[layer, record.slot] = mu

    def put_values(self, layer: int, record: SequenceRecord, evicted_values: Tensor, prompt_values: Tensor) -> None:
        """Code the stored values [H, m, D] of a sequence with a rest around the mean of the prompt's [H, P, D]."""
        assert record.recall is not None
        blocks = torch.tensor(record.recall.sketch_blocks)
        mu = self.value_mu[layer, record.slot] = prompt_values.float().mean(1)
        codes, scales = encode_values(evicted_values, mu, BITS[record.recall.rest])
        missing = len(blocks) * PAGES_PER_BLOCK - codes.shape[1]
        codes = torch.nn.functional.pad(codes.flatten(2), (0, 0, 0, missing)).unflatten(1, (len(blocks), -1))
        scales = torch.nn.functional.pad(scales, (0, missing * PAGE_TOKENS)).unflatten(1, (len(blocks), -1))
        self.value_codes[layer, blocks, ..., : codes.shape[-1]] = codes.transpose(0, 1)
        self.value_scales[layer, blocks] = scales.transpose(0, 1)

    def refuse(self, layer: int, slot: int, heads: Tensor) -> None:
        """KV heads bool [H] whose pages must not be read: estimates are NaN, so no page is ever wanted."""
        self.mu[layer, slot, heads] = torch.nan

    def sketch(self, layer: int, slots: Tensor, blocks: Tensor, kv_heads: Tensor, bits: Tensor) -> Sketch:
        """Sketches of N pairs; slots, kv_heads: int64 [N]; blocks: int64 [N, W]; T = W * SWAP_BLOCK_TOKENS.

        bits: int [N], of the coded values of each pair; 0: it has none, and no balance.
        """
        balance = torch.ones((len(slots), self.mu.shape[-1]))
        balance[bits > 0] = self.balance[layer, slots[bits > 0], kv_heads[bits > 0]]
        where = (blocks, kv_heads.unsqueeze(-1))
        return Sketch(
            by_token(self.codes[layer][where].flatten(1, 2)),
            self.scales[layer][where].flatten(1),
            self.mu[layer, slots, kv_heads],
            balance,
        )

    def values(self, layer: int, slots: Tensor, blocks: Tensor, kv_heads: Tensor, bits: int) -> CodedValues:
        """The same of the coded values of N pairs that all have `bits`."""
        where, of_page = (blocks, kv_heads.unsqueeze(-1)), padded_dim(self.mu.shape[-1]) * 2 * bits
        codes = self.value_codes[layer][where][..., :of_page].flatten(1, 2)
        return CodedValues(
            codes.unflatten(-1, (-1, 2 * bits)),
            self.value_scales[layer][where].flatten(1),
            self.value_mu[layer, slots, kv_heads].masked_fill(self.mu[layer, slots, kv_heads].isnan(), torch.nan),
        )
