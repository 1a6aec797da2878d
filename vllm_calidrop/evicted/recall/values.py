"""Coded values of evicted tokens, which unread tokens are attended with: 1 or 2 bits per channel, a scale per token.

y = Rot (v - mu), mu the mean of the head's prompt values and Rot the rotation of the key sketch (sketch.py). `v2` codes
y as the sketch codes keys, with the scale that makes the code unbiased along y: the errors of many tokens then cancel,
and on natural models the next-token distribution came nearer than with the scale of least squared error
(docs/recall.md). `v1` codes y by its signs, and the scale is the mean of |y|. D: head_dim; D': the next power of two.

A page's codes lie by channel: a word holds one channel of the page's 16 tokens, so that a sum over tokens of
weight * level, which is all that is ever asked of them, adds 16 channels at a time.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.sketch import LEVELS, padded_dim, quantised, rotation

# Bits per channel of each kind of coded values (`kv_recall_rest`); `none` keeps no values, and ignores unread tokens.
BITS = {"none": 0, "v1": 1, "v2": 2}


def levels_of(bits: int) -> tuple[float, ...]:
    """What each code stands for, in units of the token's scale. Of two bits the higher is the sign (set: plus)."""
    return (-1.0, 1.0) if bits == 1 else (-LEVELS[0], -LEVELS[1], LEVELS[0], LEVELS[1])


def encode_values(values: Tensor, mu: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of values [H, T, D] around mu [H, D]: uint8 [H, P, D', 2 bits], scales float16 [H, 16 P].

    P: pages of T tokens. A code is two bytes per bit: the codes of a channel's 16 tokens, the first token lowest.
    Tokens that fill the last page have scale 0.
    """
    rotated = (values.float() - mu.unsqueeze(1)) @ rotation(values.shape[-1]).T
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    u = torch.where(rms > 0, rotated / rms, 0.0)
    positive = u >= 0
    if bits == 1:
        scales = rotated.abs().mean(-1)
        code = positive.to(torch.int64)
    else:
        large, levels = quantised(u)
        unbiased = rms.squeeze(-1) * u.square().sum(-1) / (u.abs() * levels).sum(-1)
        scales = torch.where(rms.squeeze(-1) > 0, unbiased, 0.0)
        code = large.to(torch.int64) | positive.to(torch.int64) << 1
    filling = -values.shape[1] % PAGE_TOKENS
    by_page = pad(code, (0, 0, 0, filling)).unflatten(1, (-1, PAGE_TOKENS))
    words = (by_page << (torch.arange(PAGE_TOKENS) * bits)[:, None]).sum(2)
    codes = words.unsqueeze(-1) >> 8 * torch.arange(2 * bits) & 255
    return codes.to(torch.uint8), pad(scales, (0, filling)).to(torch.float16)


def decoded_values(codes: Tensor) -> Tensor:
    """Levels of coded values: uint8 [..., P, D', 2 bits] -> float32 [..., 16 P, D'], rotated and not yet scaled."""
    bits = codes.shape[-1] // 2
    words = (codes.to(torch.int64) << 8 * torch.arange(2 * bits)).sum(-1, keepdim=True)
    code = words >> torch.arange(PAGE_TOKENS) * bits & (1 << bits) - 1
    return _levels(bits)[code].transpose(-1, -2).flatten(-3, -2)


def value_bytes(head_dim: int, rest: str) -> int:
    """Bytes of one evicted token's coded values, of one KV head in one layer: its codes and a float16 scale."""
    bits = BITS[rest]
    return padded_dim(head_dim) * bits // 8 + torch.float16.itemsize if bits else 0


@cache
def _levels(bits: int) -> Tensor:
    return torch.tensor(levels_of(bits))
