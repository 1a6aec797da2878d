"""One layer's attention with its evicted KV recalled in several ways, against full attention.

Every step starts from exact queries, keys and values: errors are of one layer alone and do not travel to the next one.
Shapes: S tokens, P of them the prompt, D head_dim, H KV heads, G query heads of each, N decode steps, m evicted tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, attention_state, cosine, merge_states
from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.looks import page_shares, wanted_pages
from vllm_calidrop.evicted.recall.sketch import decoded, encode, estimate, rotation


@dataclass(frozen=True)
class Rule:
    """The settings of docs/recall.md, and the paper's thresholds for the rule it is compared with."""

    eps: float = 0.02
    eps_buffer: float = 0.05
    pages: int = 4
    top_p: float | None = None
    theta: float = 0.9
    buffer: int = 4
    theta1: float = 0.7
    theta2: float = 0.85


class LayerKV(NamedTuple):
    """queries: [N, H, G, D] of the decode steps, at positions P, P + 1, ...; keys, values: [H, P + N, D];
    kept, evicted: int64 [H, ...], prompt positions per KV head."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    kept: Tensor
    evicted: Tensor


class Figures:
    """Means over steps and heads, by name; a name may be added to any number of times."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._values[name].append(values.detach().float().flatten())

    def mean(self, name: str) -> float:
        return float(torch.cat(self._values[name]).mean())

    def quantile(self, name: str, q: float) -> float:
        return float(torch.cat(self._values[name]).quantile(q))


def evaluate(layer: LayerKV, prompt_len: int, scale: float, rule: Rule, figures: Figures) -> None:
    """Adds to `figures`: spread, noise (of the sketch's logits, relative to the spread), unread (mass of E that `pages`
    did not read when it looked), and for each way of recalling its error (relative, of the output) and read (part of E
    per step)."""
    steps, heads, group, _ = layer.queries.shape
    evicted_keys, evicted_values = _take(layer.keys, layer.evicted), _take(layer.values, layer.evicted)
    mu = layer.keys[:, :prompt_len].float().mean(1)
    codes, scales = encode(evicted_keys, mu)
    queries = layer.queries.transpose(0, 1)  # [H, N, G, D]
    flat = queries.flatten(1, 2)
    guess = estimate(flat, codes, scales, mu).unflatten(1, (steps, group)) * scale
    truth = (flat.float() @ evicted_keys.float().transpose(1, 2)).unflatten(1, (steps, group)) * scale
    spread = truth.std(-1)
    figures.add("spread", spread)
    figures.add("noise", (guess - truth).std(-1) / spread)

    kept = _kept_states(layer, prompt_len, scale)
    everything = _state_of(truth, evicted_values)
    full = merge_states(kept, everything).out
    size = full.norm(dim=-1)

    def judge(name: str, out: Tensor, pages: Tensor | float) -> None:
        figures.add(f"error {name}", (out - full).norm(dim=-1) / size)
        figures.add(f"read {name}", torch.as_tensor(pages) / -(-layer.evicted.shape[1] // PAGE_TOKENS))

    judge("none", kept.out, 0.0)
    two_bit = _state_of(guess, _two_bit(evicted_values, layer.values[:, :prompt_len]))
    judge("2 bits", merge_states(kept, two_bit).out, 0.0)

    wanted = _wanted(guess, kept.lse, rule)
    every = _state_of(truth.masked_fill(~_of_pages(wanted, truth.shape[-1]), -torch.inf), evicted_values)
    judge("pages, look always", merge_states(kept, every).out, wanted.sum(-1))
    mass = torch.exp(everything.lse - merge_states(kept, everything).lse)
    seen = torch.exp(every.lse - merge_states(kept, everything).lse)
    figures.add("evicted mass", mass)
    figures.add("unread", (mass - seen).clamp_min(0))

    out, pages = _stale(queries, kept, every, wanted.sum(-1), rule.theta, rule.theta, always_merge=True)
    judge("pages", out, pages)
    whole = torch.full((heads, steps), -(-layer.evicted.shape[1] // PAGE_TOKENS))
    out, pages = _stale(queries, kept, everything, whole, rule.theta1, rule.theta2, always_merge=False)
    judge("all", out, pages)
    out, pages = _buffered(queries, kept, truth, evicted_values, guess, rule)
    judge("buffer", out, pages)


def _stale(
    queries: Tensor, kept: AttentionState, fresh: AttentionState, cost: Tensor, low: float, high: float,
    always_merge: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Recompute below `low` (least of the group), else merge the state of the last recomputation above `high`."""
    outs, costs = [], []
    last, state = queries[:, 0], AttentionState(fresh.out[:, 0], fresh.lse[:, 0])
    for step in range(queries.shape[1]):
        now = queries[:, step]
        rho = cosine(now, last)
        renew = (rho.amin(-1) < low) if step else torch.ones(len(now), dtype=torch.bool)
        last = torch.where(renew[:, None, None], now, last)
        state = AttentionState(
            torch.where(renew[:, None, None], fresh.out[:, step], state.out),
            torch.where(renew[:, None], fresh.lse[:, step], state.lse),
        )
        merges = renew[:, None] | (rho > high) | always_merge
        used = AttentionState(state.out, state.lse.masked_fill(~merges, -torch.inf))
        outs.append(merge_states(AttentionState(kept.out[:, step], kept.lse[:, step]), used).out)
        costs.append(cost[:, step] * renew)
    return torch.stack(outs, 1), torch.stack(costs, 1)


def _buffered(
    queries: Tensor, kept: AttentionState, truth: Tensor, values: Tensor, guess: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The page buffer, a Python list per KV head."""
    heads, steps = queries.shape[:2]
    wanted = _wanted(guess, kept.lse, Rule(eps=rule.eps_buffer, pages=rule.pages, top_p=rule.top_p), ranked=True)
    buffers: list[list[int]] = [[] for _ in range(heads)]
    last = queries[:, 0]
    attended = torch.zeros((heads, steps, truth.shape[-1]), dtype=torch.bool)
    costs = torch.zeros(heads, steps)
    for step in range(steps):
        looks = cosine(queries[:, step], last).amin(-1) < rule.theta
        for head in range(heads):
            held, want = buffers[head], []
            if step == 0 or looks[head]:
                want = [page for page in wanted[head, step].tolist() if page >= 0]
                costs[head, step] = len(set(want) - set(held))
                buffers[head] = (want + [page for page in held if page not in want])[: rule.buffer]
                last[head] = queries[head, step]
            for page in {*held, *want}:
                attended[head, step, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = True
    state = _state_of(truth.masked_fill(~attended.unsqueeze(2), -torch.inf), values)
    return merge_states(kept, state).out, costs


def _wanted(guess: Tensor, kept_lse: Tensor, rule: Rule, ranked: bool = False) -> Tensor:
    """Pages wanted by a look at every step: bool [H, N, pages], or ranked int64 [H, N, K] with -1 for none."""
    heads, steps, _, tokens = guess.shape
    pairs = heads * steps
    padding = -tokens % PAGE_TOKENS
    logits = torch.nn.functional.pad(guess.flatten(0, 1), (0, padding))
    shares = page_shares(logits, torch.full((pairs,), tokens), kept_lse.flatten(0, 1))
    top_p = float("nan") if rule.top_p is None else rule.top_p
    wanted = wanted_pages(
        shares, torch.full((pairs,), rule.eps), torch.full((pairs,), top_p), torch.full((pairs,), rule.pages)
    )
    if not ranked:
        marked = torch.zeros((pairs, shares.shape[-1] + 1), dtype=torch.bool)
        wanted = marked.scatter(1, torch.where(wanted < 0, shares.shape[-1], wanted), True)[:, :-1]
    return wanted.unflatten(0, (heads, steps))


def _of_pages(wanted: Tensor, tokens: int) -> Tensor:
    """bool [H, N, 1, m]: the tokens of the wanted pages [H, N, pages]."""
    return wanted.repeat_interleave(PAGE_TOKENS, -1)[..., :tokens].unsqueeze(2)


def _kept_states(layer: LayerKV, prompt_len: int, scale: float) -> AttentionState:
    """States over the kept prompt tokens and the outputs so far: out [H, N, G, D], lse [H, N, G]."""
    steps = len(layer.queries)
    kept_keys = torch.cat((_take(layer.keys, layer.kept), layer.keys[:, prompt_len:]), 1)
    kept_values = torch.cat((_take(layer.values, layer.kept), layer.values[:, prompt_len:]), 1)
    so_far = torch.arange(kept_keys.shape[1]) <= layer.kept.shape[1] + torch.arange(steps)[:, None]
    queries = layer.queries.transpose(0, 1)
    return attention_state(queries, kept_keys.unsqueeze(1), kept_values.unsqueeze(1), scale, so_far)


def _state_of(logits: Tensor, values: Tensor) -> AttentionState:
    """From logits [H, N, G, m] and values [H, m, D]; where nothing is attended, logits are -inf."""
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return AttentionState(weights @ values.float().unsqueeze(1), lse)


def _two_bit(values: Tensor, all_values: Tensor) -> Tensor:
    """Values [H, m, D] coded as keys are: what 2-bit K and V on the device give without reading anything."""
    mu = all_values.float().mean(1)
    codes, scales = encode(values, mu)
    coded = decoded(codes) * scales.float().unsqueeze(-1)
    return mu.unsqueeze(1) + coded @ rotation(values.shape[-1])


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
