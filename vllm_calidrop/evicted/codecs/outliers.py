"""Outlier tokens: the few tokens whose keys leave the per-channel pattern, and would widen every channel's range.

Source: arXiv 2505.10938. Keys lie close together along a channel, and a few channels (outlier channels) are far from
zero in nearly all tokens; a token that is unusually small or large there spoils the range that all share. Such tokens
are found by the norm of their keys in the outlier channels, measured from the group's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The outlier channels of a group: this part of its channels, those of the widest range.
CHANNEL_SHARE = 1 / 8


def outlier_tokens(keys: Tensor, exists: Tensor, count: int) -> Tensor:
    """The `count` tokens of each group that deviate most: int64 [..., count] positions, the worst first.

    keys: float32 [..., G, D]; exists: bool, broadcast to [..., G]. Where fewer than `count` exist, the rest of the
    positions are those of tokens that do not.
    """
    is_token = exists.unsqueeze(-1)
    width = torch.where(is_token, keys, -torch.inf).amax(-2) - torch.where(is_token, keys, torch.inf).amin(-2)
    channels = width.topk(max(1, int(keys.shape[-1] * CHANNEL_SHARE)), dim=-1).indices
    chosen = keys.gather(-1, channels.unsqueeze(-2).expand(*keys.shape[:-1], -1))
    mean = torch.where(is_token, chosen, 0.0).sum(-2, keepdim=True) / exists.sum(-1)[..., None, None]
    deviation = torch.linalg.vector_norm(chosen - mean, dim=-1)
    return torch.where(exists, deviation, -1.0).topk(count, dim=-1).indices
