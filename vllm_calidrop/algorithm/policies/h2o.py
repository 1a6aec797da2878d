"""H2O (arXiv 2306.14048): half of the budget for the heavy hitters of the whole prompt, half for its last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies.base import Needs, Policy, ScoreInputs

# Queries scored at once: bounds the scratch to Hq x 128 x P floats instead of an n x n matrix.
QUERY_TILE = 128


class H2O(Policy):
    """An odd budget gives the recent half the extra token; recent tokens take no part in the ranking."""

    name = "h2o"
    needs = Needs.COLUMN_SUMS

    def importance(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.column_sums is not None
        recent = inputs.budget - inputs.budget // 2
        importance = inputs.column_sums.clone()
        importance[:, inputs.prompt_len - recent :] = torch.inf
        return importance


def add_column_sums(sums: Tensor, queries: Tensor, keys: Tensor, first_position: int, scale: float) -> None:
    """Add the causal softmax attention of some consecutive prompt queries to `sums`, mean over each group's heads.

    sums: float32 [H, P], changed in place. queries: [q, Hq, D] at positions first_position, first_position + 1, ...
    keys: [H, k, D], k >= first_position + q.
    """
    heads, _, head_dim = keys.shape
    keys_t = keys.float().transpose(-1, -2)
    for start in range(0, queries.shape[0], QUERY_TILE):
        tile = queries[start : start + QUERY_TILE].float()
        length = tile.shape[0]
        end = first_position + start + length
        # One matrix per KV head: broadcasting the keys over the group would copy them for each of its heads.
        tile = tile.view(length, heads, -1, head_dim).permute(1, 2, 0, 3).reshape(heads, -1, head_dim)
        logits = torch.bmm(tile, keys_t[..., :end]).mul_(scale).view(heads, -1, length, end)
        position = torch.arange(end, device=logits.device)
        logits.masked_fill_(position > position[end - length :, None], -torch.inf)
        sums[:, :end] += torch.softmax(logits, dim=-1).sum(dim=-2).mean(dim=1)
