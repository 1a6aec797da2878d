"""The rest: attention over the evicted tokens that are not read, from their sketched keys and coded values.

Shapes: N pairs of (sequence, KV head), G query heads of each, T tokens in P pages of PAGE_TOKENS, D head_dim, D'
padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState
from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.sketch import rotation
from vllm_calidrop.evicted.recall.values import decoded_values

# The attention, as a part of the whole, that may fall to pages whose values are not looked at, because none of these P
# pages has more than NEGLIGIBLE / P of it for any query head: their weight counts, at the mean value. The error is at
# most their share of |v - mu|.
NEGLIGIBLE = 1 / 16


def rest_state(
    logits: Tensor, shares: Tensor, tokens: Tensor, excluded: Tensor, codes: Tensor, scales: Tensor, mu: Tensor,
    negligible: float = NEGLIGIBLE,
) -> AttentionState:  # fmt: skip
    """State over the tokens of all pages but the excluded ones: out float32 [N, G, D], lse float32 [N, G].

    logits: [N, G, T], estimated, scaled and less their inflation; shares: [N, G, P], each page's part of the whole
    attention, by which `negligible` is measured; tokens: int64 [N], how many of T exist; excluded: bool [N, P], pages
    attended otherwise; codes: uint8 [N, P, D', 2 bits], scales: [N, T], mu: [N, D], the coded values. Where mu is NaN
    the KV must not be used, and the state is empty: out 0, lse -inf.
    """
    exists = torch.arange(logits.shape[-1]) < tokens.unsqueeze(-1)
    counts = exists & ~excluded.repeat_interleave(PAGE_TOKENS, dim=-1) & ~mu.isnan().any(-1, keepdim=True)
    logits = torch.where(counts.unsqueeze(1), logits, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    total = weights.sum(-1, keepdim=True)  # 1, or 0 for the empty set

    pages = (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
    large = (shares.amax(1) * pages.unsqueeze(-1) >= negligible).repeat_interleave(PAGE_TOKENS, dim=-1) & counts
    scaled = torch.where(large.unsqueeze(1), weights * scales.float().unsqueeze(1), 0.0)
    rotated = torch.matmul(scaled, decoded_values(codes))
    return AttentionState(rotated @ rotation(mu.shape[-1]) + total * mu.nan_to_num().unsqueeze(1), lse)
