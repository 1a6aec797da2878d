"""What recall by pages keeps on the device for one sequence, in bytes of one KV head in one layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.sketch import token_bytes
from vllm_calidrop.evicted.recall.values import BITS, value_bytes

# Which page a buffer place holds and how new it is: two int64.
PLACE_BYTES = 16


class RecallBytes(NamedTuple):
    """Bytes of one KV head in one layer.

    keys: the sketch, codes and scales of all evicted tokens. values: their coded values, 0 without a rest. vectors: the
    mean key, and with a rest the mean value and the balance. buffer: the page buffer.
    """

    keys: int
    values: int
    vectors: int
    buffer: int

    @property
    def total(self) -> int:
        return sum(self)


def recall_bytes(tokens: int, head_dim: int, rest: str, buffer_pages: int, dtype: torch.dtype) -> RecallBytes:
    """Of `tokens` stored evicted tokens, under settings `kv_recall_rest` and `kv_recall_buffer`; dtype: of the KV."""
    return RecallBytes(
        tokens * token_bytes(head_dim),
        tokens * value_bytes(head_dim, rest),
        vector_bytes(head_dim, rest),
        buffer_pages * place_bytes(head_dim, dtype),
    )


def vector_bytes(head_dim: int, rest: str) -> int:
    """float32 vectors of one sequence: the mean key, with a rest also the mean value and the balance."""
    return (3 if BITS[rest] else 1) * head_dim * torch.float32.itemsize


def place_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """One place of a page buffer: K and V of a page, and what is known about it."""
    return 2 * PAGE_TOKENS * head_dim * dtype.itemsize + PLACE_BYTES
