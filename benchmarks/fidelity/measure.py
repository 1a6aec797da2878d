"""From two answers with the same tokens to figures: how far the second one's distributions are from the first one's."""

from __future__ import annotations

import math
from collections.abc import Mapping

LEAST_PROBABILITY = 1e-12


def divergence(full: Mapping[int, float], rule: Mapping[int, float]) -> float:
    """KL(full || rule) in nats, from the log-probabilities of the likeliest tokens of each.

    The bins are the tokens that both name; those that only `full` names, together; and all others. Merging tokens into
    a bin can only make the divergence smaller, and what `rule` gives to the tokens it does not name, of which it says
    only that none is likelier than the last it names, is taken as it makes the divergence least. So this is a lower
    bound of the whole vocabulary's.
    """
    both = full.keys() & rule.keys()
    total = sum(math.exp(full[token]) * (full[token] - rule[token]) for token in both)
    unnamed = [math.exp(full[token]) for token in full.keys() - rule.keys()]
    p_unnamed = sum(unnamed)
    p_other = max(0.0, 1 - p_unnamed - sum(math.exp(full[token]) for token in both))
    q_left = max(0.0, 1 - sum(math.exp(rule[token]) for token in both))
    if p_unnamed + p_other > LEAST_PROBABILITY:
        most = len(unnamed) * math.exp(min(rule.values()))
        q_unnamed = min(most, q_left * p_unnamed / (p_unnamed + p_other))
        for p, q in ((p_unnamed, q_unnamed), (p_other, q_left - q_unnamed)):
            if p > LEAST_PROBABILITY:
                total += p * math.log(p / max(q, LEAST_PROBABILITY))
    return max(0.0, total)


def likeliest(logprobs: Mapping[int, float]) -> int:
    """The token of the largest log-probability; of equals the lowest id."""
    return min(logprobs, key=lambda token: (-logprobs[token], token))
