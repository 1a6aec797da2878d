"""Which prompt tokens each KV head keeps, and in which order of importance the others are evicted.

Every policy reads the prompt's queries and keys of one layer, after RoPE, and keeps exactly ``budget`` tokens
per KV head. Some positions are kept whatever their score (``always``); the others, a contiguous range of
*candidates*, are ranked. Equal scores go to the lower position.

Shapes: ``q`` [kv_heads, group, P, head_dim], ``k`` [kv_heads, P, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.settings import Settings


@dataclass(frozen=True)
class Selection:
    """The outcome for one layer.

    kept: [kv_heads, budget] positions, ascending
    evicted: [kv_heads, P - budget] positions, the most important first
    ranked_scores: [kv_heads, candidates] scores in descending order; None where no arithmetic decides
    picked: how many of the ranked candidates are kept
    """

    kept: Tensor
    evicted: Tensor
    ranked_scores: Tensor | None
    picked: int

    def gap(self, taken: int) -> float:
        """Smallest relative score gap, over KV heads, between the last of the best ``taken`` candidates and
        the next one; inf where nothing is decided there."""
        if self.ranked_scores is None or not 0 < taken < self.ranked_scores.shape[-1]:
            return float("inf")
        worst_in, best_out = self.ranked_scores[:, taken - 1], self.ranked_scores[:, taken]
        size = torch.maximum(worst_in.abs(), best_out.abs()).clamp_min(torch.finfo(worst_in.dtype).tiny)
        return ((worst_in - best_out) / size).min().item()


def select(q: Tensor, k: Tensor, scale: float, settings: Settings) -> Selection:
    """Keep exactly ``settings.budget`` of the P prompt tokens per KV head. Requires P > budget."""
    kv_heads, prompt_tokens = k.shape[:2]
    assert settings.evicts(prompt_tokens)
    selection = _POLICIES[settings.kv_policy](q, k, scale, settings)
    assert selection.kept.shape == (kv_heads, settings.budget)
    assert selection.evicted.shape == (kv_heads, prompt_tokens - settings.budget)
    return selection


def snapkv(q: Tensor, k: Tensor, scale: float, settings: Settings) -> Selection:
    """SnapKV (arXiv 2404.14469): the last ``window`` queries vote for the keys before the window.

    The softmax of each window query runs over all keys up to itself; its weights are summed over the window
    and averaged over the group's query heads. Average pooling (stride 1, padding kernel // 2, padded zeros
    counted in the divisor) sees only positions before the window. For an even kernel this padding gives one
    output too many: the first P - window are taken.
    """
    prompt_tokens, window = k.shape[1], settings.window
    before = prompt_tokens - window
    weights = causal_weights(q[:, :, before:], k, scale)  # [kv_heads, group, window, P]
    votes = weights.sum(dim=2).mean(dim=1)[:, :before]  # [kv_heads, P - window]
    kernel = settings.kv_pool_kernel
    scores = F.avg_pool1d(votes, kernel, stride=1, padding=kernel // 2, count_include_pad=True)[:, :before]
    return _rank(scores, range(before), settings.budget - window, always=range(before, prompt_tokens))


def h2o(q: Tensor, k: Tensor, scale: float, settings: Settings) -> Selection:
    """H2O (arXiv 2306.14048): half the budget by attention received from all prompt queries, half recent.

    An odd budget gives the recent half the extra token; the recent half takes no part in the ranking.
    """
    prompt_tokens = k.shape[1]
    heavy = settings.budget // 2
    before = prompt_tokens - (settings.budget - heavy)
    received = causal_weights(q, k, scale).sum(dim=2).mean(dim=1)  # [kv_heads, P]
    return _rank(received[:, :before], range(before), heavy, always=range(before, prompt_tokens))


def streaming_llm(q: Tensor, k: Tensor, scale: float, settings: Settings) -> Selection:
    """StreamingLLM (arXiv 2309.17453): the first ``sinks`` tokens and the most recent ones.

    The more recent, the more important: the score of a position is the position itself.
    """
    kv_heads, prompt_tokens = k.shape[:2]
    candidates = range(settings.sinks, prompt_tokens)
    scores = torch.tensor(candidates, dtype=torch.float64).expand(kv_heads, -1)
    chosen = _rank(scores, candidates, settings.budget - settings.sinks, always=range(settings.sinks))
    return Selection(chosen.kept, chosen.evicted, ranked_scores=None, picked=chosen.picked)


_POLICIES = {"snapkv": snapkv, "h2o": h2o, "streaming_llm": streaming_llm}


def causal_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax attention of the last T positions over all P keys, each seeing keys up to itself.

    q: [kv_heads, group, T, head_dim], k: [kv_heads, P, head_dim] -> [kv_heads, group, T, P]
    """
    queries, keys = q.shape[2], k.shape[1]
    logits = scale * q @ k.unsqueeze(1).transpose(-1, -2)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(diagonal=keys - queries + 1)
    return logits.masked_fill(future, float("-inf")).softmax(dim=-1)


def _rank(scores: Tensor, candidates: range, picks: int, always: range) -> Selection:
    """Keep ``always`` and the ``picks`` best candidates; ``scores`` [kv_heads, candidates]."""
    ranked = scores.sort(dim=-1, descending=True, stable=True)  # stable: ties to the lower position
    order = ranked.indices + candidates.start
    fixed = torch.tensor(always, dtype=torch.long).expand(scores.shape[0], -1)
    kept = torch.cat([order[:, :picks], fixed], dim=-1).sort(dim=-1).values
    return Selection(kept, order[:, picks:], ranked.values, picks)
