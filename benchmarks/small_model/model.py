"""A compact Llama for training: the function of Hugging Face's `LlamaForCausalLM` (`export.py` checks it).

Shapes: B texts, T positions, H query heads, G key/value heads, D head dimension, E hidden size, V words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    vocab: int
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-6
    positions: int = 1152


def rope_frequencies(shape: Shape) -> Tensor:
    """[D / 2] radians per position."""
    return shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in Hugging Face's convention; x: [B, T, H, D]; cos, sin: [T, 1, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        e, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_norm = nn.Parameter(torch.ones(e))
        self.post_norm = nn.Parameter(torch.ones(e))
        self.q_proj = nn.Parameter(torch.empty(q, e))
        self.k_proj = nn.Parameter(torch.empty(kv, e))
        self.v_proj = nn.Parameter(torch.empty(kv, e))
        self.o_proj = nn.Parameter(torch.empty(e, q))
        self.gate_proj = nn.Parameter(torch.empty(shape.mlp, e))
        self.up_proj = nn.Parameter(torch.empty(shape.mlp, e))
        self.down_proj = nn.Parameter(torch.empty(e, shape.mlp))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, E]; returns the next residual and the rotated queries [B, T, H, D]."""
        s, dtype = self.shape, torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        batch, length, _ = x.shape
        h = F.rms_norm(x, (s.hidden,), self.input_norm, s.eps).to(dtype)
        qkv = F.linear(h, torch.cat((self.q_proj, self.k_proj, self.v_proj)).to(dtype))
        q, k, v = qkv.view(batch, length, -1, s.head_dim).split((s.heads, s.kv_heads, s.kv_heads), dim=2)
        q, k = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype)
        group = s.heads // s.kv_heads
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.repeat_interleave(group, dim=2).transpose(1, 2),
            v.repeat_interleave(group, dim=2).transpose(1, 2),
            is_causal=True,
        )
        x = x + F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.o_proj.to(dtype))
        h = F.rms_norm(x, (s.hidden,), self.post_norm, s.eps).to(dtype)
        gate, up = F.linear(h, torch.cat((self.gate_proj, self.up_proj)).to(dtype)).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down_proj.to(dtype)), q


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor
    layers: list[Layer]

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))  # type: ignore[assignment]
        angle = torch.arange(shape.positions).float()[:, None, None] * rope_frequencies(shape)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        set_priors(self, seed)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids: [B, T]; returns the normed last residual [B, T, E] and every layer's rotated queries."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x, queries = F.embedding(ids, self.embed), []
        for layer in self.layers:
            x, q = layer(x, cos, sin)
            queries.append(q)
        return F.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.eps), queries

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., E] -> [.., V] with the tied embedding."""
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        return F.linear(hidden.to(dtype), self.embed.to(dtype)).float()


@torch.no_grad()
def set_priors(model: Llama, seed: int) -> None:
    """Initial weights that make retrieval reachable; a plain initialisation does not learn it in this budget.

    - `o_proj` of a head = 0.5 v_proj^T + 0.5 random: a head starts by copying what it attends to;
    - `q_proj` = 0.5 k_proj + 0.5 random: a head starts by attending to what resembles its own token;
    - embedding dimension 0 is the constant 0.16; in layer 0 it drives head 0 ("one back") and head 2 ("two
      back") through RoPE phases: the score is sum_i cos((distance - back) * frequency_i).
    """
    shape, gen = model.shape, torch.Generator().manual_seed(seed)
    d, group = shape.head_dim, shape.heads // shape.kv_heads

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=gen) * std

    model.embed.copy_(normal(model.embed, 0.04))
    model.embed[:, 0] = 0.16
    for layer in model.layers:
        layer.k_proj.copy_(normal(layer.k_proj, shape.hidden**-0.5))
        layer.q_proj.copy_(0.5 * normal(layer.q_proj, shape.hidden**-0.5))
        layer.v_proj.copy_(normal(layer.v_proj, 0.5 * shape.hidden**-0.5))
        layer.o_proj.copy_(0.5 * normal(layer.o_proj, 0.5 * shape.hidden**-0.5))
        for head in range(shape.heads):
            rows, kv_rows = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
            layer.q_proj[rows] += 0.5 * layer.k_proj[kv_rows]
            layer.o_proj[:, rows] += 0.5 * layer.v_proj[kv_rows].T
        for matrix in (layer.gate_proj, layer.up_proj):
            matrix.copy_(normal(matrix, shape.hidden**-0.5))
        layer.down_proj.copy_(normal(layer.down_proj, 0.25 * shape.mlp**-0.5))

    first, phase = model.layers[0], rope_frequencies(shape)
    radius = 7.0 / (0.16 / math.sqrt(0.04**2 + 0.16**2 / shape.hidden))
    for back, head in ((1, 0), (2, 2)):
        q = first.q_proj[head * d : (head + 1) * d]
        k = first.k_proj[head // group * d : (head // group + 1) * d]
        q.mul_(0.2)
        k.mul_(0.2)
        k[:, 0] = torch.cat((torch.ones(d // 2), torch.zeros(d // 2))) * radius
        q[:, 0] = torch.cat(((-back * phase).cos(), (-back * phase).sin())) * radius
