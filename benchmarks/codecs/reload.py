"""Time of reading evicted KV again, by codec: the decode operator where every KV head recomputes."""

from __future__ import annotations

import time

import torch

from benchmarks.operators import Layers, filled_cache, rows_of, sequence
from vllm_calidrop.evicted.codecs import CODECS, number_of
from vllm_calidrop.ops.base import ModelKV, OperatorSet

BLOCK_SIZE, KEPT = 32, 64


class Reload:
    """One sequence and layer; bf16. Every call reads all `tokens` evicted tokens of every KV head."""

    def __init__(self, tokens: int, kv_heads: int, group: int, head_dim: int, isa: str = "vec") -> None:
        torch.manual_seed(0)
        self.model = ModelKV(torch.bfloat16, kv_heads, group, head_dim, BLOCK_SIZE, isa)
        self.original_bytes = tokens * kv_heads * 2 * head_dim * self.model.dtype.itemsize
        self.cache, block_table = filled_cache(self.model, 1, KEPT // BLOCK_SIZE, [(0, KEPT)])
        self.queries = torch.randn((1, kv_heads * group, head_dim)).to(self.model.dtype)
        self.keys, self.values = torch.randn((2, kv_heads, tokens, head_dim)).to(self.model.dtype)
        self.layers, self.tokens = Layers(self.model, 1, -(-tokens // 128)), tokens
        self.rows = rows_of(torch.zeros(1), torch.full((1,), KEPT), block_table)

    def seconds(self, operators: type[OperatorSet], codec: str, repeats: int) -> float:
        """The least of some calls: on a shared machine the others are somebody else's time."""
        blocks = tuple(range(self.layers.pool.codecs[number_of(codec)].blocks_for(self.tokens)))
        self.layers.pool.write(0, blocks, self.keys, self.values, codec)
        self.layers.admit(sequence(0, 0, self.tokens, blocks, codec, (2.0, 2.0)))
        served, out = self.layers.served_by(operators), torch.empty_like(self.queries)
        best = float("inf")
        for _ in range(repeats + 1):
            started = time.perf_counter()
            served.decode(self.queries, out, self.cache, 0, self.rows, self.model.head_dim**-0.5)
            best = min(best, time.perf_counter() - started)
        return best


def measure(reload: Reload, operators: type[OperatorSet], repeats: int, rounds: int) -> dict[str, float]:
    """Seconds by codec; rounds over all codecs, so that a slow minute hits them all."""
    best = dict.fromkeys(CODECS, float("inf"))
    for _ in range(rounds):
        for name in CODECS:
            best[name] = min(best[name], reload.seconds(operators, name, repeats))
    return best
