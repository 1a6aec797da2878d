"""A stress that the small model is not: outlier channels, diffuse attention, logits of a language model's spread.

Keys are normal with a common offset and a few channels of large scale; queries drift slowly and are scaled so that the
logits over the evicted tokens have the asked spread. Nothing stands out, so many small pages add up.
"""

from __future__ import annotations

import torch

from benchmarks.recall_check.evaluate import LayerKV


def layer(
    tokens: int, budget: int, steps: int, spread: float, seed: int, heads: int = 2, group: int = 4, head_dim: int = 128
) -> LayerKV:
    """Kept: 32 sinks and the most recent tokens."""
    random = torch.Generator().manual_seed(seed)
    channel = torch.ones(head_dim)
    channel[torch.randperm(head_dim, generator=random)[:4]] = 12.0
    keys = torch.randn(heads, tokens + steps, head_dim, generator=random) * channel
    keys += 8 * torch.randn(heads, 1, head_dim, generator=random)
    values = torch.randn(heads, tokens + steps, head_dim, generator=random)
    drift = torch.randn(steps, heads, group, head_dim, generator=random).cumsum(0)
    queries = torch.randn(1, heads, group, head_dim, generator=random) + 0.1 * drift
    sinks = min(32, budget // 2)
    kept = torch.cat((torch.arange(sinks), torch.arange(tokens - budget + sinks, tokens))).expand(heads, -1)
    evicted = torch.arange(sinks, tokens - budget + sinks).expand(heads, -1)
    logits = torch.einsum("nhgd,htd->nhgt", queries, keys[:, evicted[0]]) * head_dim**-0.5
    queries = queries * (spread / logits.std(-1, keepdim=True))
    return LayerKV(queries, keys, values, kept.contiguous(), evicted.contiguous())
