"""Attention states, their merge (the paper's equation 1) and the gate of Algorithm 2.

Query heads are laid out as [kv_heads, group]: query head ``h`` is ``[h // group, h % group]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class State(NamedTuple):
    """Attention of one query per head over a set of tokens.

    out: [kv_heads, group, head_dim], softmax(scale q K) V
    lse: [kv_heads, group], logsumexp(scale q K): the logarithm of the paper's C_weight
    """

    out: Tensor
    lse: Tensor


def attention_state(q: Tensor, k: Tensor, v: Tensor, scale: float) -> State:
    """q [kv_heads, group, head_dim], k and v [kv_heads, tokens, head_dim]. No tokens: out = 0, lse = -inf."""
    logits = scale * q @ k.transpose(-1, -2)  # [kv_heads, group, tokens]
    return State(logits.softmax(dim=-1) @ v, logits.logsumexp(dim=-1))


def merge(a: State, b: State) -> State:
    """The state over the union of two disjoint token sets (equation 1); an empty set changes nothing."""
    largest = torch.maximum(a.lse, b.lse)
    finite = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
    weight_a, weight_b = (a.lse - finite).exp(), (b.lse - finite).exp()
    total = weight_a + weight_b
    divisor = torch.where(total > 0, total, torch.ones_like(total))
    alpha_a, alpha_b = weight_a / divisor, weight_b / divisor
    return State(alpha_a.unsqueeze(-1) * a.out + alpha_b.unsqueeze(-1) * b.out, finite + total.log())


def cosine(q: Tensor, c: Tensor) -> Tensor:
    """rho = cos(q, c) over the last dimension: [..., head_dim] twice -> [...]."""
    return (q * c).sum(-1) / (q.norm(dim=-1) * c.norm(dim=-1)).clamp_min(1e-20)


class Decision(NamedTuple):
    """What each query head does in this step; neither: it attends the kept tokens alone.

    recompute, merge: bool [kv_heads, group], never both
    margin: how far rho is from the nearest threshold at which any of these decisions would be another one
    """

    recompute: Tensor
    merge: Tensor
    margin: float


def decide(rho: Tensor, theta1: float, theta2: float, gate: str) -> Decision:
    """The branches of Algorithm 2 for rho [kv_heads, group]. A rho equal to a threshold lies inside the band.

    ``head``: every query head for itself. ``group``: one head below theta1 makes its whole group recompute;
    in other groups each head merges by its own rho. ``group_mean``: the group's mean rho decides for all its
    heads.
    """
    if gate == "group_mean":
        rho = rho.mean(dim=-1, keepdim=True).expand_as(rho)
    recompute = rho < theta1
    distance1 = (rho - theta1).abs()
    if gate == "group":
        lowest = rho.min(dim=-1, keepdim=True).values.expand_as(rho)
        recompute = lowest < theta1
        distance1 = (lowest - theta1).abs()
    merge_stored = (rho > theta2) & ~recompute
    # Where a group recomputes because one head is well below theta1, the others' rho decides nothing.
    distance2 = (rho - theta2).abs().masked_fill(recompute, float("inf"))
    return Decision(recompute, merge_stored, torch.minimum(distance1, distance2).min().item())


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full causal attention: q [kv_heads, group, T, head_dim], k and v [kv_heads, T, head_dim] -> as q."""
    k, v = k.unsqueeze(1).expand_as(q), v.unsqueeze(1).expand_as(q)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
