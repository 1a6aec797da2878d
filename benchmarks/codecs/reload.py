"""Time of reading evicted KV again, by codec: the decode operator where every KV head recomputes."""

from __future__ import annotations

import time

import torch

from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.codecs import CODECS, number_of
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.choice import DecodeOp
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.worker.state_table import StateTable

BLOCK_SIZE, KEPT = 32, 64


class Reload:
    """One sequence and layer; bf16. Every call reads all `tokens` evicted tokens of every KV head."""

    def __init__(self, tokens: int, kv_heads: int, group: int, head_dim: int, isa: str = "vec") -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16
        self.original_bytes = tokens * kv_heads * 2 * head_dim * dtype.itemsize
        columns = KEPT // BLOCK_SIZE
        shape = (columns, kv_heads, BLOCK_SIZE, 2 * head_dim)
        self.cache = PackedCache(torch.randn(shape, generator=generator).to(dtype), isa)
        self.table = StateTable(1, 1, kv_heads, group, head_dim, dtype)
        self.queries = torch.randn((1, kv_heads * group, head_dim), generator=generator).to(dtype)
        keys, values = torch.randn((2, kv_heads, tokens, head_dim), generator=generator).to(dtype)
        self.pool = SwapPool(1, -(-tokens // 128), kv_heads, head_dim, dtype)
        self.keys, self.values, self.tokens, self.columns = keys, values, tokens, columns

    def rows(self, codec: str) -> DecodeRows:
        blocks = torch.arange(self.pool.codecs[number_of(codec)].blocks_for(self.tokens))
        self.pool.write(0, blocks, self.keys, self.values, codec)
        one = torch.zeros(1, dtype=torch.int64)
        return DecodeRows(
            tokens=one,
            slots=one,
            blocks=torch.arange(self.columns, dtype=torch.int32)[None],
            start=one,
            end=one + KEPT,
            block_size=BLOCK_SIZE,
            calibrated=one,
            calibrated_slots=one,
            theta1=torch.full((1,), 2.0),
            theta2=torch.full((1,), 2.0),
            gate=one,
            swap_blocks=blocks[None],
            stored=one + self.tokens,
            codec=None if codec == "none" else one + number_of(codec),
        )

    def seconds(self, op: DecodeOp, codec: str, repeats: int) -> float:
        """The least of some calls: on a shared machine the others are somebody else's time."""
        rows, scale = self.rows(codec), self.cache.head_dim**-0.5
        best = float("inf")
        for _ in range(repeats + 1):
            started = time.perf_counter()
            op(rows, 0, self.queries, self.cache, self.pool, self.table, scale)
            best = min(best, time.perf_counter() - started)
        return best


def measure(reload: Reload, op: DecodeOp, repeats: int, rounds: int) -> dict[str, float]:
    """Seconds by codec; rounds over all codecs, so that a slow minute hits them all."""
    best = dict.fromkeys(CODECS, float("inf"))
    for _ in range(rounds):
        for name in CODECS:
            best[name] = min(best[name], reload.seconds(op, name, repeats))
    return best
