"""Queries, keys and values of every layer of a Hugging Face model on a prompt and its greedy continuation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "recall_check"

# (layer, queries [Hq, S, D], keys [H, S, D], values [H, S, D], scale), after RoPE
Listener = Callable[[int, Tensor, Tensor, Tensor, float], None]

_listener: Listener | None = None


def continuation(model: Any, prompt: list[int], steps: int) -> list[int]:
    """`steps` greedy tokens, whatever they are."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def run(model: Any, ids: list[int], listener: Listener) -> None:
    """One forward pass with full attention; the listener hears every layer."""
    global _listener
    _listener = listener
    try:
        model.set_attn_implementation(NAME)
        model(torch.tensor([ids]), use_cache=False)
    finally:
        _listener = None
        model.set_attn_implementation("sdpa")


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    assert _listener is not None
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    _listener(module.layer_idx, query[0], key[0], value[0], float(scale))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
