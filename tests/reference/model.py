"""Algorithms 1 and 2 inside a Llama forward written by hand from Hugging Face weights; one sequence.

Life of a request: the prompt runs with full attention and gives the first token (``_prefill``); each layer
then splits the prompt's KV into kept and evicted tokens and stores the calibration state of the last position
(Algorithm 1, ``_compress``); every further token runs through Algorithm 2 in each layer
(``_decode_attention``). Generated tokens are always kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference.attention import State, attention_state, cosine, decide, merge, prompt_attention
from tests.reference.codecs import read_bytes, read_page_bytes, stored_as
from tests.reference.policies import select
from tests.reference.recall import PAGE, HeadRecall, Rest, rest_of
from tests.reference.settings import BALANCE_QUERIES, Settings

NO_DECISION, PLAIN, MERGE, RECOMPUTE = -1, 0, 1, 2


@dataclass
class Margins:
    """How close the run came to being decided by rounding; inf where nothing was decided.

    rho: smallest distance of a cosine to a threshold that would have changed a decision
    share: recall by pages: smallest relative distance of a page's share to where other pages would have been read
    score: smallest relative score gap at the eviction boundary, and at the boundary of what the host keeps
    logit: smallest gap between the two largest logits, over all generated tokens
    """

    rho: float = float("inf")
    share: float = float("inf")
    score: float = float("inf")
    logit: float = float("inf")


@dataclass
class Result:
    """What a run gave.

    tokens, logprobs: generated tokens (the end token included) and their log-probabilities
    kept: per layer [kv_heads, kept_count] kept prompt positions, ascending
    hosted: per layer [kv_heads, host_tokens] evicted positions that can still be read, ascending
    decisions: [steps, layers, kv_heads, group] of NO_DECISION, PLAIN, MERGE, RECOMPUTE; a step is one run of
        Algorithm 2 (the first token, and the first one after a preemption, come from exact prefill)
    rhos: as decisions, the cosine itself; NaN where there was no decision, or recall by pages made it
    pages: [steps, layers, kv_heads] pages of 16 evicted tokens that were read
    skipped: [layers] reads (recall by pages: pages) that the read budget kept from being made
    kept_count, evicted_count: prompt tokens per KV head, in and out of the cache
    """

    prompt_tokens: int
    kept_count: int
    evicted_count: int
    kept: list[Tensor]
    hosted: list[Tensor]
    decisions: Tensor
    rhos: Tensor
    pages: Tensor
    skipped: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: Margins = field(default_factory=Margins)

    @property
    def recomputes(self) -> list[int]:
        """Per layer, over query heads and steps."""
        return self._per_layer(self.decisions == RECOMPUTE)

    @property
    def merges(self) -> list[int]:
        """Per layer, over query heads and steps."""
        return self._per_layer(self.decisions == MERGE)

    @property
    def plain(self) -> list[int]:
        """Per layer, over query heads and steps."""
        return self._per_layer(self.decisions == PLAIN)

    @property
    def group_reads(self) -> list[int]:
        """Per layer, over KV heads and steps: a group's evicted KV is read when any of its heads recomputes (and,
        with recall by pages, wants a page it has not).
        """
        return self._per_layer((self.pages > 0).unsqueeze(-1))

    @property
    def pages_read(self) -> list[int]:
        """Per layer, over KV heads and steps."""
        return self._per_layer(self.pages.unsqueeze(-1))

    @staticmethod
    def _per_layer(chosen: Tensor) -> list[int]:
        return chosen.sum(dim=(0, 2, 3)).tolist()


class _Layer(NamedTuple):
    """Weights of one layer, each as Hugging Face has it: [out, in]."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass
class _Calibration:
    """The evicted tokens that can be read again and the state stored for the query ``q`` [kv_heads, group,
    dim].
    """

    evicted_k: Tensor
    evicted_v: Tensor
    most_reads: float
    q: Tensor
    state: State


@dataclass
class _LayerCache:
    """k, v: [kv_heads, kept + generated, head_dim]. Without calibration and recall only these are attended."""

    k: Tensor
    v: Tensor
    calibration: _Calibration | None = None
    recall: list[HeadRecall] | None = None
    most_reads: float = math.inf


class _Trace:
    """Decisions and cosines of all steps, as they are made."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.decisions: list[Tensor] = []
        self.rhos: list[Tensor] = []
        self.pages: list[Tensor] = []
        self.skipped = [0] * shape[0]

    def new_step(self) -> None:
        self.decisions.append(torch.full(self.shape, NO_DECISION))
        self.rhos.append(torch.full(self.shape, float("nan")))
        self.pages.append(torch.zeros(self.shape[:2], dtype=torch.long))

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        empty = torch.empty(0, *self.shape)
        return (
            torch.stack(self.decisions) if self.decisions else empty.long(),
            torch.stack(self.rhos) if self.rhos else empty,
            torch.stack(self.pages) if self.pages else empty[..., 0].long(),
        )


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [kv_heads, group, T, head_dim], k, v [kv_heads, T, head_dim]) -> out, shaped as q."""


class Reference:
    """CaliDrop over the weights of a Hugging Face ``LlamaForCausalLM``, loaded once."""

    def __init__(self, model: str | Path | LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(model, LlamaForCausalLM):
            model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = model.config
        if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
            raise ValueError("the reference knows Llama with SiLU and without biases only")
        self.dtype = dtype
        assert config.head_dim and config.num_key_value_heads
        self.head_dim = config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.scale = self.head_dim**-0.5
        self.norm_eps: float = config.rms_norm_eps
        self.eos_token_id = config.eos_token_id
        self.inv_freq = model.model.rotary_emb.get_buffer("inv_freq").float()
        self.rope_scale: float = model.model.rotary_emb.attention_scaling

        def weight(module: torch.nn.Module) -> Tensor:
            return module.get_parameter("weight").detach().to(dtype)

        self.embedding = weight(model.model.embed_tokens)
        self.final_norm = weight(model.model.norm)
        self.lm_head = weight(model.lm_head)
        self.layers = [
            _Layer(
                input_norm=weight(layer.input_layernorm),
                q=weight(layer.self_attn.q_proj),
                k=weight(layer.self_attn.k_proj),
                v=weight(layer.self_attn.v_proj),
                o=weight(layer.self_attn.o_proj),
                mlp_norm=weight(layer.post_attention_layernorm),
                gate=weight(layer.mlp.gate_proj),
                up=weight(layer.mlp.up_proj),
                down=weight(layer.mlp.down_proj),
            )
            for layer in model.model.layers
        ]

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """Full causal attention over ``ids`` -> [len(ids), vocab]."""
        hidden = self._forward(ids, 0, lambda _, q, k, v: prompt_attention(q, k, v, self.scale))
        return hidden @ self.lm_head.T

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        settings: Settings,
        eos_token_id: int | None = None,
        forced: list[int] | None = None,
        resume_at: int | None = None,
    ) -> Result:
        """Greedy decoding of one prompt.

        eos_token_id: generation ends with this token (it is part of the result); None: always ``max_tokens``
        forced: these tokens are taken as the first generated ones, whatever the model prefers; logprobs are
        theirs
        resume_at: a preemption once this many tokens are out: prompt and outputs run again with full
            attention, the
            same prompt tokens are evicted, the calibration state is that of the last replayed position, and
            the next token comes from this exact prefill. Counts go on from those before. Nothing happens
            where generation ends first.
        """
        prompt_tokens = len(prompt_ids)
        trace = _Trace((len(self.layers), self.kv_heads, self.group))
        tokens: list[int] = []
        logprobs: list[float] = []
        margins = Margins()

        caches, kept, hosted, logits = self._prefill(prompt_ids, prompt_tokens, settings, margins)
        while True:
            token = int(logits.argmax())
            if forced is not None and len(tokens) < len(forced):
                token = forced[len(tokens)]
            top = logits.topk(2).values
            margins.logit = min(margins.logit, (top[0] - top[1]).item())
            tokens.append(token)
            logprobs.append(logits.log_softmax(dim=-1)[token].item())
            if len(tokens) >= max_tokens or token == eos_token_id:
                break
            if len(tokens) == resume_at:
                replayed = prompt_ids + tokens
                caches, kept, hosted, logits = self._prefill(replayed, prompt_tokens, settings, margins)
            else:
                logits = self._decode(token, prompt_tokens + len(tokens) - 1, caches, settings, trace, margins)

        kept_count = settings.budget if settings.evicts(prompt_tokens) else prompt_tokens
        decisions, rhos, pages = trace.stacked()
        return Result(
            prompt_tokens=prompt_tokens,
            kept_count=kept_count,
            evicted_count=prompt_tokens - kept_count,
            kept=kept,
            hosted=hosted,
            decisions=decisions,
            rhos=rhos,
            pages=pages,
            skipped=trace.skipped,
            tokens=tokens,
            logprobs=logprobs,
            margins=margins,
        )

    # Algorithm 1

    def _prefill(
        self, ids: list[int], prompt_tokens: int, settings: Settings, margins: Margins
    ) -> tuple[list[_LayerCache], list[Tensor], list[Tensor], Tensor]:
        """Full attention over ``ids`` (the prompt, after a preemption also outputs), then compression of each
        layer.

        Returns the caches, kept and hosted positions per layer, and the last position's logits [vocab].
        """
        caches: list[_LayerCache] = []
        kept: list[Tensor] = []
        hosted: list[Tensor] = []

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache, layer_kept, layer_hosted = self._compress(q, k, v, prompt_tokens, settings, margins)
            caches.append(cache)
            kept.append(layer_kept)
            hosted.append(layer_hosted)
            return prompt_attention(q, k, v, self.scale)

        hidden = self._forward(ids, 0, attend)
        return caches, kept, hosted, hidden[-1] @ self.lm_head.T

    def _compress(
        self, q: Tensor, k: Tensor, v: Tensor, prompt_tokens: int, settings: Settings, margins: Margins
    ) -> tuple[_LayerCache, Tensor, Tensor]:
        """Split one layer's prompt KV; q [kv_heads, group, n, head_dim], k and v [kv_heads, n, head_dim].

        Only the first ``prompt_tokens`` of the n positions score, are scored and can be evicted; the query of
        the calibration state is that of position n - 1.
        """
        if not settings.evicts(prompt_tokens):
            everything = torch.arange(prompt_tokens).expand(self.kv_heads, -1)
            return _LayerCache(k, v), everything, everything[:, :0]

        selection = select(q[:, :, :prompt_tokens], k[:, :prompt_tokens], self.scale, settings)
        host_tokens = settings.host_tokens(evicted=prompt_tokens - settings.budget)
        hosted = selection.evicted[:, :host_tokens].sort(dim=-1).values
        margins.score = min(margins.score, selection.gap(selection.picked))
        if host_tokens > 0:
            margins.score = min(margins.score, selection.gap(selection.picked + host_tokens))

        outputs_k, outputs_v = k[:, prompt_tokens:], v[:, prompt_tokens:]
        cache = _LayerCache(
            k=torch.cat([_gather(k, selection.kept), outputs_k], dim=1),
            v=torch.cat([_gather(v, selection.kept), outputs_v], dim=1),
        )
        if host_tokens == 0:
            return cache, selection.kept, hosted
        evicted_k, evicted_v, last_q = _gather(k, hosted), _gather(v, hosted), q[:, :, -1]
        read_k, read_v = self._as_stored(evicted_k, evicted_v, settings)
        if settings.kv_recall == "pages":
            prompt_k, prompt_v = k[:, :prompt_tokens], v[:, :prompt_tokens]
            rests: list[Rest | None] = [None] * self.kv_heads
            if settings.has_rest:
                last = q[:, :, max(0, prompt_tokens - BALANCE_QUERIES) : prompt_tokens]
                parts = zip(last, prompt_k, prompt_v, evicted_v, strict=True)
                rests = [rest_of(*part, settings.kv_recall_rest) for part in parts]
            heads = zip(evicted_k, read_k, read_v, prompt_k.mean(dim=1), rests, strict=True)
            cache.recall = [HeadRecall(*head, settings, self.scale, rest) for *head, rest in heads]
            cache.most_reads = self._most_reads(read_page_bytes(settings.kv_codec, *self._element), settings)
        else:
            state = attention_state(last_q, evicted_k, evicted_v, self.scale)
            most = self._most_reads(read_bytes(settings.kv_codec, host_tokens, *self._element), settings)
            cache.calibration = _Calibration(read_k, read_v, most, last_q, state)
        return cache, selection.kept, hosted

    @property
    def _element(self) -> tuple[int, int]:
        return self.head_dim, self.dtype.itemsize

    def _as_stored(self, k: Tensor, v: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """k and v [kv_heads, m, head_dim] as they are read again."""
        heads = [stored_as(settings.kv_codec, *head) for head in zip(k, v, strict=True)]
        return torch.stack([head[0] for head in heads]), torch.stack([head[1] for head in heads])

    def _most_reads(self, one_read: int, settings: Settings) -> float:
        """How many reads of so many bytes each layer may make in a step."""
        if settings.kv_read_budget is None:
            return math.inf
        return settings.kv_read_budget // (len(self.layers) * one_read)

    # Algorithm 2

    def _decode(
        self,
        token: int,
        position: int,
        caches: list[_LayerCache],
        settings: Settings,
        trace: _Trace,
        margins: Margins,
    ) -> Tensor:
        """One token through all layers -> logits [vocab]."""
        trace.new_step()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = caches[layer]
            cache.k, cache.v = torch.cat([cache.k, k], dim=1), torch.cat([cache.v, v], dim=1)
            return self._decode_attention(layer, q[:, :, 0], cache, settings, trace, margins).unsqueeze(2)

        return self._forward([token], position, attend)[-1] @ self.lm_head.T

    def _decode_attention(
        self, layer: int, q: Tensor, cache: _LayerCache, settings: Settings, trace: _Trace, margins: Margins
    ) -> Tensor:
        """q [kv_heads, group, head_dim] -> out, same shape. The current token is already in the cache."""
        kept_state = attention_state(q, cache.k, cache.v, self.scale)
        if cache.recall is not None:
            recalled = self._recall(layer, q, kept_state.lse, cache, trace, margins)
            return merge(kept_state, recalled).out
        stored = cache.calibration
        if stored is None:
            return kept_state.out

        rho = cosine(q, stored.q)
        recompute, merge_stored, margin = decide(rho, settings.kv_theta1, settings.kv_theta2, settings.kv_gate)
        late = _beyond_budget(rho, recompute, stored.most_reads, settings, margins)
        for kv_head in late:
            by = rho[kv_head].mean().expand_as(rho[kv_head]) if settings.kv_gate == "group_mean" else rho[kv_head]
            recompute[kv_head], merge_stored[kv_head] = False, by > settings.kv_theta2
            margin = min(margin, float((by - settings.kv_theta2).abs().min()))
        trace.skipped[layer] += len(late)

        fresh = attention_state(q, stored.evicted_k, stored.evicted_v, self.scale)
        stored.q = torch.where(recompute.unsqueeze(-1), q, stored.q)
        stored.state = State(
            out=torch.where(recompute.unsqueeze(-1), fresh.out, stored.state.out),
            lse=torch.where(recompute, fresh.lse, stored.state.lse),
        )
        calibrated = merge(kept_state, stored.state)

        trace.decisions[-1][layer] = MERGE * merge_stored + RECOMPUTE * recompute
        trace.pages[-1][layer] = recompute.any(dim=-1) * math.ceil(stored.evicted_k.shape[1] / PAGE)
        trace.rhos[-1][layer] = rho
        margins.rho = min(margins.rho, margin)
        return torch.where((recompute | merge_stored).unsqueeze(-1), calibrated.out, kept_state.out)

    @staticmethod
    def _recall(layer: int, q: Tensor, kept_lse: Tensor, cache: _LayerCache, trace: _Trace, margins: Margins) -> State:
        """Recall by pages; a look is a recomputation of every query head of its group."""
        heads = cache.recall
        assert heads is not None
        pages: list[tuple[float, int, int]] = []
        dropped: set[tuple[int, int]] = set()
        if cache.most_reads < math.inf:
            found = [head.would_read(*asked) for head, *asked in zip(heads, q, kept_lse, strict=True)]
            pages = [(-share, kv_head, page) for kv_head, read in enumerate(found) for page, share in read]
        if len(pages) > cache.most_reads:
            most = int(cache.most_reads)
            pages = sorted(pages, key=lambda page: page[:2])  # a head's own pages stay in order of share
            dropped = {(kv_head, page) for _, kv_head, page in pages[most:]}
            if most:
                margins.share = min(margins.share, 1 - pages[most][0] / pages[most - 1][0])
        trace.skipped[layer] += len(dropped)
        steps = [
            head.step(*asked, dropped=[page for of, page in dropped if of == kv_head])
            for kv_head, (head, *asked) in enumerate(zip(heads, q, kept_lse, strict=True))
        ]
        for kv_head, (head, step) in enumerate(zip(heads, steps, strict=True)):
            trace.decisions[-1][layer, kv_head] = RECOMPUTE if step.looked else MERGE if step.merges else PLAIN
            trace.pages[-1][layer, kv_head] = step.pages
            margins.rho = min(margins.rho, head.margins.rho)
            margins.share = min(margins.share, head.margins.share)
        return State(torch.stack([step.out for step in steps]), torch.stack([step.lse for step in steps]))

    # Llama

    def _forward(self, ids: list[int], first_position: int, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]; ``attend`` is the attention of each layer."""
        length = len(ids)
        cos, sin = self._rotary(first_position, length)
        x = self.embedding[ids]
        for index, layer in enumerate(self.layers):
            h = self._norm(x, layer.input_norm)
            q = (h @ layer.q.T).view(length, self.kv_heads, self.group, self.head_dim).permute(1, 2, 0, 3)
            k = (h @ layer.k.T).view(length, self.kv_heads, self.head_dim).transpose(0, 1)
            v = (h @ layer.v.T).view(length, self.kv_heads, self.head_dim).transpose(0, 1)
            out = attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + out.permute(2, 0, 1, 3).reshape(length, -1) @ layer.o.T
            h = self._norm(x, layer.mlp_norm)
            x = x + (F.silu(h @ layer.gate.T) * (h @ layer.up.T)) @ layer.down.T
        return self._norm(x, self.final_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.norm_eps))

    def _rotary(self, first_position: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim]; the angles are float32, as Hugging Face has them."""
        positions = torch.arange(first_position, first_position + length, dtype=torch.float32)
        half = positions.unsqueeze(-1) * self.inv_freq
        angles = torch.cat([half, half], dim=-1)
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        return cos.to(self.dtype), sin.to(self.dtype)


def _beyond_budget(rho: Tensor, recompute: Tensor, most: float, settings: Settings, margins: Margins) -> list[int]:
    """KV heads that want to recompute and may not: all but the ``most`` least similar, the lower head first."""
    similarity = rho.mean(dim=-1) if settings.kv_gate == "group_mean" else rho.min(dim=-1).values
    wants = [kv_head for kv_head in range(len(rho)) if recompute[kv_head].any()]
    wants.sort(key=lambda kv_head: (float(similarity[kv_head]), kv_head))
    if len(wants) <= most:
        return []
    if most > 0:
        gap = similarity[wants[int(most)]] - similarity[wants[int(most) - 1]]
        margins.rho = min(margins.rho, float(gap))
    return wants[int(most) :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, head_dim] in Hugging Face's ``rotate_half`` convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """x [kv_heads, tokens, head_dim], positions [kv_heads, n] -> [kv_heads, n, head_dim]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
