"""Runs of evicted K and V to encode: a real model's, and ones made to hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.recall_check import capture
from vllm_calidrop.algorithm.policies import POLICIES, ScoreInputs


class Run(NamedTuple):
    """keys, values: bf16 [H, T, D], evicted; queries: float32 [H, Q, D] that read them again; scale of the logits."""

    name: str
    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float


def evicted_of(model: Any, prompt: list[int], steps: int, budget: int) -> Iterator[Run]:
    """Per layer: what StreamingLLM evicts of the prompt, and the queries of a greedy continuation."""
    ids = prompt + capture.continuation(model, prompt, steps)
    found = []

    def hear(layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        heads, tokens = keys.shape[0], len(prompt)
        inputs = ScoreInputs(
            prompt_len=tokens,
            num_kv_heads=heads,
            budget=budget,
            window=1,
            sinks=budget // 2,
            pool_kernel=1,
            scale=scale,
            device=keys.device,
        )
        index = POLICIES["streaming_llm"].select(inputs, tokens - budget).evicted.unsqueeze(-1)
        index = index.expand(-1, -1, keys.shape[-1])
        asked = queries.view(heads, -1, *queries.shape[1:])[:, :, tokens:].flatten(1, 2)
        kept = (keys[:, :tokens].gather(1, index).bfloat16(), values[:, :tokens].gather(1, index).bfloat16())
        found.append(Run(f"layer {layer}", *kept, asked.float(), scale))

    capture.run(model, ids, hear)
    yield from found


def _outlier_channel(keys: Tensor) -> None:
    keys[..., 5] += 40


def _outlier_tokens(keys: Tensor) -> None:
    """Outlier channels in which one token in seventy is unusually small or large."""
    keys[..., 8:24] += 100
    keys[:, 45::144, 8:24] = -60
    keys[:, 117::144, 8:24] = 150


def _long_tokens(keys: Tensor) -> None:
    keys[:, 30::97] *= 50


SYNTHETIC: dict[str, Callable[[Tensor], None]] = {
    "normal": lambda keys: None,
    "one outlier channel": _outlier_channel,
    "outlier tokens": _outlier_tokens,
    "long tokens": _long_tokens,
}


def synthetic(name: str, seed: int, heads: int = 4, tokens: int = 2000, head_dim: int = 128) -> Run:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, heads, tokens, head_dim), generator=generator).bfloat16()
    queries = torch.randn((heads, 16, head_dim), generator=generator)
    SYNTHETIC[name](keys)
    return Run(name, keys, values, queries, head_dim**-0.5)
