"""The balance of a key sketch: channels where queries are large get finer codes, at no cost in bits.

q . k = (q / w) . (w k) for any positive weights w. The noise of a rotated code is spread evenly over the channels of w
k, and reaches the logit through q / w: the weights w = sqrt(rms_q / rms_k) make both vectors as even as they can be
made at once, the way SmoothQuant (arXiv 2211.10438) moves outliers between activations and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Queries of the last prompt positions that the balance is made from, and the least that anything of it may be.
BALANCE_QUERIES = 32
LEAST = 1e-6


def balance_queries(rest: str, prompt_len: int) -> int:
    """Of how many of a prompt's last positions the queries are needed for the balance under a `kv_recall_rest`."""
    return min(BALANCE_QUERIES, prompt_len) if rest != "none" else 0


def balance_of(queries: Tensor, keys: Tensor, mu: Tensor) -> Tensor:
    """Weights of the key channels of each KV head: float32 [H, D].

    queries: [X, Hq, D], the last prompt queries after RoPE, Hq a multiple of H; keys: [H, P, D], the prompt's; mu: [H,
    D], their mean. rms_q is over the queries of all heads of the group and is not centred; rms_k is over k - mu.
    """
    of_group = queries.float().unflatten(1, (keys.shape[0], -1))
    rms_q = of_group.square().mean((0, 2)).sqrt().clamp_min(LEAST)
    rms_k = (keys.float() - mu.unsqueeze(1)).square().mean(1).sqrt().clamp_min(LEAST)
    return torch.sqrt(rms_q / rms_k).clamp_min(LEAST)
