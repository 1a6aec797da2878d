"""The reference written a second time, on purpose differently, to check the first one.

Hugging Face's own model runs (its projections, rotary embedding, cache), in float64, with this attention
plugged in. All keys and values stay in Hugging Face's cache; *kept* and *hosted* are boolean masks over
positions, one per KV head; lost is what neither has. Every query head is handled alone in a Python loop. A
recomputing head attends kept and hosted tokens in one softmax, which is what merging with a fresh state must
equal; merging weighs with a sigmoid of the lse difference. Policies rank with plain Python sorting. Only the
settings' names and defaults are shared with the first reference.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.masking_utils import eager_mask

from tests.reference.settings import Settings


@dataclass
class SecondResult:
    """tokens; per layer, per KV head: kept and hosted positions; per layer: Counter of decisions and
    reads.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[list[list[int]]] = field(default_factory=list)
    hosted: list[list[list[int]]] = field(default_factory=list)
    counts: list[Counter[str]] = field(default_factory=list)


class SecondReference:
    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = copy.deepcopy(model).double().eval()
        for module in self.model.modules():
            for name, child in list(module.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":  # Hugging Face's rounds to float32
                    exact = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=torch.float64)
                    exact.weight = child.weight
                    setattr(module, name, exact)
        self.model.set_attn_implementation("calidrop_second")

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        settings: Settings,
        eos_token_id: int | None = None,
        forced: list[int] | None = None,
        resume_at: int | None = None,
    ) -> SecondResult:
        result = SecondResult(counts=[Counter() for _ in self.model.model.layers])
        prompt = list(prompt_ids)
        pending = prompt
        run = _Run(len(prompt), settings, result)
        while len(result.tokens) < max_tokens:
            for layer in self.model.model.layers:
                layer.self_attn.calidrop_run = run
            position_ids = torch.arange(run.seen, run.seen + len(pending)).unsqueeze(0)
            logits = self.model(
                torch.tensor([pending]), past_key_values=run.cache, position_ids=position_ids, use_cache=True
            ).logits[0, -1]
            run.seen += len(pending)
            index = len(result.tokens)
            token = forced[index] if forced is not None and index < len(forced) else int(torch.argmax(logits))
            result.tokens.append(token)
            result.logprobs.append(float(torch.log_softmax(logits, -1)[token]))
            if token == eos_token_id:
                break
            pending = [token]
            if len(result.tokens) == resume_at:
                pending = prompt + result.tokens
                run = _Run(len(prompt), settings, result)
        result.kept = [[_positions(m[: len(prompt)]) for m in run.kept[i]] for i in sorted(run.kept)]
        result.hosted = [[_positions(m[: len(prompt)]) for m in run.hosted[i]] for i in sorted(run.hosted)]
        return result


class _Run:
    """One life of a request in the cache; a preemption starts another."""

    def __init__(self, prompt_tokens: int, settings: Settings, result: SecondResult) -> None:
        self.prompt_tokens = prompt_tokens
        self.settings = settings
        self.result = result
        self.cache = DynamicCache()
        self.seen = 0
        self.kept: dict[int, list[Tensor]] = {}
        self.hosted: dict[int, list[Tensor]] = {}
        # (layer, query head): q, out, lse
        self.stored: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [heads, T, dim], k and v [kv_heads, S, dim]: the last T of S positions -> [heads, T, dim]."""
        if layer not in self.kept:
            return self._whole(layer, q, k, v, scale)
        assert q.shape[1] == 1
        return self._step(layer, q[:, 0], k, v, scale).unsqueeze(1)

    def _whole(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, length, _ = q.shape
        group = heads // k.shape[0]
        out = torch.empty_like(q)
        weights = []
        for h in range(heads):
            logits = scale * (q[h] @ k[h // group].T)
            logits[torch.arange(length)[None, :] > torch.arange(length)[:, None]] = -math.inf
            weights.append(torch.softmax(logits, -1))
            out[h] = weights[-1] @ v[h // group]

        prompt, settings = self.prompt_tokens, self.settings
        self.kept[layer], self.hosted[layer] = [], []
        for g in range(k.shape[0]):
            mean = torch.stack(weights[g * group : (g + 1) * group]).mean(0)
            keep, evicted = list(range(prompt)), list[int]()
            budget = None if settings.kv_policy == "full" else settings.kv_budget
            if budget is not None and prompt > budget:
                keep, evicted = _split(mean[:prompt, :prompt].tolist(), prompt, settings)
            if not settings.kv_calibration:
                evicted = []
            elif settings.kv_calibration_size is not None:
                evicted = evicted[: settings.kv_calibration_size]
            self.kept[layer].append(_mask(keep, prompt))
            self.hosted[layer].append(_mask(evicted, prompt))

        for h in range(heads):
            hosted = self.hosted[layer][h // group]
            if hosted.any():
                hosted = _extend(hosted, length, False)
                self.stored[layer, h] = (
                    q[h, -1],
                    *_over(hosted, q[h, -1], k[h // group], v[h // group], scale),
                )
        return out

    def _step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [heads, dim]: the query of the last position."""
        settings, count = self.settings, self.result.counts[layer]
        heads, total = q.shape[0], k.shape[1]
        group = heads // k.shape[0]
        rho = {
            h: float(torch.nn.functional.cosine_similarity(q[h], self.stored[layer, h][0], dim=0))
            for h in range(heads)
            if (layer, h) in self.stored
        }
        rows, read = [], set()
        for h in range(heads):
            g = h // group
            mine = (q[h], k[g], v[g], scale)
            kept = _extend(self.kept[layer][g], total, True)
            out_kept, lse_kept = _over(kept, *mine)
            if h not in rho:
                rows.append(out_kept)
                continue
            family = [rho[i] for i in range(g * group, (g + 1) * group)]
            own = sum(family) / group if settings.kv_gate == "group_mean" else rho[h]
            trigger = min(family) if settings.kv_gate == "group" else own
            if trigger < settings.kv_theta1:
                count["recomputes"] += 1
                read.add(g)
                hosted = _extend(self.hosted[layer][g], total, False)
                rows.append(_over(kept | hosted, *mine)[0])
                self.stored[layer, h] = (q[h], *_over(hosted, *mine))
            elif own > settings.kv_theta2:
                count["merges"] += 1
                _, out_stored, lse_stored = self.stored[layer, h]
                share = torch.sigmoid(lse_stored - lse_kept)
                rows.append(share * out_stored + (1 - share) * out_kept)
            else:
                count["plain"] += 1
                rows.append(out_kept)
        count["group_reads"] += len(read)
        return torch.stack(rows)


def _split(weights: list[list[float]], prompt: int, settings: Settings) -> tuple[list[int], list[int]]:
    """weights[query][key], the group's mean -> kept positions, evicted positions with the most important
    first.
    """
    budget = settings.budget
    if settings.kv_policy == "streaming_llm":
        recent = budget - settings.sinks
        keep = [i for i in range(prompt) if i < settings.sinks or i >= prompt - recent]
        return keep, [i for i in reversed(range(prompt)) if settings.sinks <= i < prompt - recent]
    if settings.kv_policy == "h2o":
        tail = (budget + 1) // 2
        score = [math.fsum(row[i] for row in weights) for i in range(prompt - tail)]
    else:
        tail, kernel = settings.window, settings.kv_pool_kernel
        votes = [math.fsum(row[i] for row in weights[prompt - tail :]) for i in range(prompt - tail)]
        padded = [0.0] * (kernel // 2) + votes + [0.0] * kernel
        score = [math.fsum(padded[i : i + kernel]) / kernel for i in range(prompt - tail)]
    ranked = sorted(range(prompt - tail), key=lambda i: (-score[i], i))
    return ranked[: budget - tail] + list(range(prompt - tail, prompt)), ranked[budget - tail :]


def _over(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query over the masked positions of one KV head: out [dim], lse []."""
    logits = torch.where(mask, scale * (k @ q), -math.inf)
    return torch.softmax(logits, 0) @ v, torch.logsumexp(logits, 0)


def _mask(positions: list[int], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[positions] = True
    return mask


def _extend(mask: Tensor, total: int, value: bool) -> Tensor:
    """The mask over prompt positions, continued by ``value`` for generated ones."""
    return torch.cat([mask, torch.full((total - len(mask),), value)])


def _positions(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _plugged_in(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: query [1, heads, T, dim], key and value [1, kv_heads, S, dim]."""
    out = module.calidrop_run.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("calidrop_second", _plugged_in)
AttentionMaskInterface.register("calidrop_second", eager_mask)
