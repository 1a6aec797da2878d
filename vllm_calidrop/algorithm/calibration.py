"""The mathematics of CaliDrop: attention states, their merge, and the gate. Nothing of vLLM.

Source: arXiv 2507.19906, section 3 (equation 1, Algorithm 2). The paper's `alpha` is never formed from a raw sum of
exponentials: a state carries its log-sum-exp instead, and `d_k` in the algorithms is read as `sqrt(d_k)`.

Shapes: N rows, H KV heads, G query heads per KV head, T tokens, D head_dim. Everything is computed in float32.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Gate(IntEnum):
    """Who decides whether evicted KV is read again (`kv_gate`)."""

    GROUP = 0
    HEAD = 1
    GROUP_MEAN = 2

    @classmethod
    def of(cls, name: str) -> Gate:
        return cls[name.upper()]


class AttentionState(NamedTuple):
    """Attention of a query over one set of tokens.

    out: [..., G, D] float32, softmax(scale * q . K) V; zero for an empty set.
    lse: [..., G] float32, logsumexp(scale * q . K), natural logarithm; -inf for an empty set.
    """

    out: Tensor
    lse: Tensor


class Decision(NamedTuple):
    """What every query head does in one step; bool [N, H, G] each. Neither: the kept tokens' state alone.

    skipped: bool [N, H], groups that would have recomputed but for the read budget; None: there is no budget.
    """

    recompute: Tensor
    merge: Tensor
    skipped: Tensor | None = None


def attention_state(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None = None
) -> AttentionState:
    """State of `query` [..., G, D] over `keys` and `values` [..., T, D].

    valid: bool [..., T], False for columns that hold no token of the set (they may hold anything, NaN included).
    """
    k, v = keys.float(), values.float()
    if valid is not None:
        v = torch.where(valid.unsqueeze(-1), v, 0.0)
    logits = torch.matmul(query.float(), k.transpose(-1, -2)) * scale
    if valid is not None:
        logits = torch.where(valid.unsqueeze(-2), logits, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return AttentionState(torch.matmul(weights, v), lse)


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the union of two disjoint token sets (equation 1). An empty set (lse = -inf) changes nothing."""
    top = torch.maximum(a.lse, b.lse)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = torch.exp(a.lse - top), torch.exp(b.lse - top)
    total = weight_a + weight_b
    share_a = torch.where(total > 0, weight_a / total, 0.0).unsqueeze(-1)
    share_b = torch.where(total > 0, weight_b / total, 0.0).unsqueeze(-1)
    return AttentionState(a.out * share_a + b.out * share_b, top + torch.log(total))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, [..., D] -> [...]; 0 where a vector is zero."""
    a, b = a.float(), b.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)


def decide(rho: Tensor, theta1: Tensor, theta2: Tensor, gate: Tensor, most_reads: Tensor | None = None) -> Decision:
    """Algorithm 2, lines 3 and 10, under each row's gate. A rho equal to a threshold is inside the band.

    rho: [N, H, G], NaN for a head that neither recomputes nor merges; theta1, theta2: float [N]; gate: int [N], values
    of `Gate`. most_reads: int [N], groups of a row that may recompute: those of lowest similarity, ties to the lower
    KV head; the others do what the thresholds say for no recomputation. None: all that want.
    GROUP: any head below theta1 recomputes its whole group, otherwise each head merges by its own rho.
    HEAD: every head decides alone. GROUP_MEAN: the group's mean rho decides for all its heads.
    """
    low_of_group = rho.amin(-1, keepdim=True).expand_as(rho)
    mean_of_group = rho.mean(-1, keepdim=True).expand_as(rho)
    gate = gate[:, None, None]
    for_recompute = torch.where(gate == Gate.GROUP, low_of_group, torch.where(gate == Gate.HEAD, rho, mean_of_group))
    for_merge = torch.where(gate == Gate.GROUP_MEAN, mean_of_group, rho)
    recompute = for_recompute < theta1[:, None, None]
    skipped = None
    if most_reads is not None:
        of_group = torch.where(gate == Gate.GROUP_MEAN, mean_of_group, low_of_group)[..., 0]
        wants = recompute.any(-1)
        order = torch.where(wants, of_group, torch.inf).argsort(dim=-1, stable=True)
        skipped = wants & (order.argsort(-1) >= most_reads[:, None])
        recompute = recompute & ~skipped.unsqueeze(-1)
    return Decision(recompute, ~recompute & (for_merge > theta2[:, None, None]), skipped)
