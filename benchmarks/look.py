"""A look with the rest against a look alone, in C++, one KV head, one thread: `python -m benchmarks.look`.

Both are called in turn in one process, so that they meet the same machine; the ratio is the median over the rounds.
Many copies of the codes are looked at one after the other, so that none is still in the CPU's caches from before.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vllm_calidrop.evicted.layout import PAGES_PER_BLOCK, swap_blocks_for
from vllm_calidrop.evicted.recall.sketch import padded_dim
from vllm_calidrop.ops.cpp import library
from vllm_calidrop.ops.cpp.look import CodedHead, Look, operator_of

COPIES = 64


def looks_of(tokens: int, heads: int, head_dim: int, bits: int, spread: float) -> tuple[list[Look], list[Look]]:
    """Looks alone and with the rest, at COPIES heads each. spread: standard deviation of the logits."""
    operator, blocks = operator_of(library.load()), swap_blocks_for(tokens)
    channels, order = padded_dim(head_dim), torch.arange(blocks, dtype=torch.int32)
    query = torch.randn(heads, head_dim) * spread
    nothing = torch.tensor([], dtype=torch.int64)
    alone, with_rest = [], []
    for _ in range(COPIES):
        codes = torch.randint(0, 256, (blocks, PAGES_PER_BLOCK, channels // 16, 16, 4), dtype=torch.uint8)
        value_codes = torch.randint(0, 256, (blocks, PAGES_PER_BLOCK, channels, 2 * bits), dtype=torch.uint8)
        scales = torch.ones((blocks, PAGES_PER_BLOCK, 16), dtype=torch.float16)
        keys = CodedHead(codes, scales, torch.zeros(head_dim))
        both = keys._replace(
            value_codes=value_codes, value_scales=scales, value_mu=torch.zeros(head_dim), balance=torch.ones(head_dim)
        )
        where = (query, order, tokens, torch.zeros(heads), nothing, head_dim**-0.5)
        alone.append(Look(operator, keys, *where))
        with_rest.append(Look(operator, both, *where))
    return alone, with_rest


def seconds(looks: list[Look]) -> float:
    start = time.process_time()
    for look in looks:
        look()
    return (time.process_time() - start) / len(looks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="evicted tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    print("| evicted | query heads | head_dim | values | logit spread | look, µs | with the rest, µs | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        for heads, head_dim in ((1, 64), (3, 64), (4, 64), (7, 64), (4, 128)):
            for bits, spread in ((2, 3.0), (2, 0.3), (1, 0.3)):
                alone, with_rest = looks_of(tokens, heads, head_dim, bits, spread)
                pairs = [(seconds(alone), seconds(with_rest)) for _ in range(arguments.rounds + 1)][1:]
                ratio = statistics.median(b / a for a, b in pairs)
                a, b = (statistics.median(side) * 1e6 for side in zip(*pairs, strict=True))
                row = (tokens, heads, head_dim, f"v{bits}", spread, f"{a:.1f}", f"{b:.1f}", f"{ratio:.2f}")
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
