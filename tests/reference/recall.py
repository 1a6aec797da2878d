"""Recall by pages, one KV head at a time, in plain steps (docs/recall.md, The rule).

A ``HeadRecall`` is made when the prompt is compressed and asked once per decode step. Sketched keys are kept as the
vectors that their two bits stand for, turned back by the inverse rotation: an estimate is an ordinary dot product.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.settings import Settings

PAGE = 16
INNER, OUTER, BOUNDARY = 0.4528, 1.5104, 0.9816
DISTORTION = 0.1175  # of this quantiser: what is left of a variance of 1


class Step(NamedTuple):
    """What one KV head does in one decode step.

    looked: it looked; pages: how many pages it read; merges: it did not look, and there is something to merge
    out [group, dim], lse [group]: the state over what is recalled, to be merged with the kept tokens' state
    """

    looked: bool
    pages: int
    merges: bool
    out: Tensor
    lse: Tensor


@dataclass
class HeadMargins:
    """How close this head's decisions were: cosines to theta; page shares to where another page would be wanted."""

    rho: float = math.inf
    share: float = math.inf


@dataclass
class Rest:
    """What a KV head whose unread tokens are attended too knows beside its sketch.

    weights: [dim], of the key channels; v: [m, dim], the evicted values as their codes stand for them; mu: [dim], the
    mean of the prompt's values.
    """

    weights: Tensor
    v: Tensor
    mu: Tensor


def rest_of(queries: Tensor, prompt_k: Tensor, prompt_v: Tensor, evicted_v: Tensor, kind: str) -> Rest:
    """queries: [group, n, dim], of the last prompt positions; prompt_k, prompt_v: [P, dim]; evicted_v: [m, dim]."""
    least = torch.tensor(1e-6)
    queries_rms = queries.pow(2).flatten(0, 1).mean(0).sqrt()
    keys_rms = prompt_k.var(dim=0, correction=0).sqrt()
    weights = (torch.maximum(queries_rms, least) / torch.maximum(keys_rms, least)).sqrt()
    mu = prompt_v.mean(0)
    coded = torch.stack([_coded_value(row, kind) for row in _rotate(evicted_v - mu)])
    return Rest(torch.maximum(weights, least), mu + _unrotate(coded)[:, : len(mu)], mu)


@dataclass
class HeadRecall:
    """One layer's KV head. Its readable evicted tokens [m, dim], in order of position: sketched, the keys that are
    sketched; k, v: what is read. mu: [dim]. rest: None where tokens that are not read are ignored.
    """

    sketched: Tensor
    k: Tensor
    v: Tensor
    mu: Tensor
    settings: Settings
    scale: float
    rest: Rest | None = None
    margins: HeadMargins = field(default_factory=HeadMargins)
    last_q: Tensor | None = None
    stale: tuple[Tensor, Tensor] | None = None
    buffer: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = torch.ones_like(self.mu) if self.rest is None else self.rest.weights
        rows = _rotate((self.sketched - self.mu) * weights)
        self.estimated_k = self.mu + _unrotate(_quantise(rows))[:, : self.k.shape[1]] / weights
        self.scales = torch.stack([_code_and_scale(row)[1].half().to(row.dtype) for row in rows])

    def would_read(self, q: Tensor, kept_lse: Tensor) -> list[tuple[int, float]]:
        """Pages that this step would read, and their shares, the largest first. Nothing is changed by asking."""
        if not self._looks(q):
            return []
        return [(page, self.shares[page]) for page in self._wanted(q, kept_lse) if page not in self.buffer]

    def step(self, q: Tensor, kept_lse: Tensor, dropped: list[int]) -> Step:
        """q [group, dim], kept_lse [group]: log-sum-exp over the kept tokens. The state of what is recalled.

        dropped: pages that may not be read.
        """
        settings = self.settings
        looks = self._looks(q)
        attended = list(self.buffer)
        read: list[int] = []
        if looks:
            wanted = [page for page in self._wanted(q, kept_lse) if page not in dropped]
            read = [page for page in wanted if page not in self.buffer]
            attended += read
            self.last_q = q
            self.buffer = (wanted + [page for page in self.buffer if page not in wanted])[: settings.kv_recall_buffer]
        elif self.rest is not None or not settings.kv_recall_buffer:
            assert self.stale is not None
            out, lse = self.stale
            return Step(False, 0, not math.isinf(float(lse[0])), out, lse)

        out, lse = self._attend(q, attended)
        if looks and self.rest is not None:
            out, lse = self._with_rest(q, out, lse, attended, self.rest)
        if looks:
            self.stale = (out, lse)
        return Step(looks, len(read), not looks and bool(attended), out, lse)

    def _with_rest(self, q: Tensor, out: Tensor, lse: Tensor, attended: list[int], rest: Rest) -> tuple[Tensor, Tensor]:
        """The state over the attended pages, and over the codes of all other tokens."""
        unread = [i for i in range(len(self.k)) if i // PAGE not in attended]
        if not unread:
            return out, lse
        logits = torch.cat([lse.unsqueeze(-1), self._estimates(q)[:, unread]], dim=-1)
        weights = logits.softmax(-1)
        small = [16 * len(self.shares) * self.shares[i // PAGE] < 1 for i in unread]  # these count, at the mean value
        v = torch.where(torch.tensor(small).unsqueeze(-1), rest.mu, rest.v[unread])
        return weights[:, :1] * out + weights[:, 1:] @ v, logits.logsumexp(-1)

    def _estimates(self, q: Tensor) -> Tensor:
        """Logits [group, m] from the sketch; with a rest less what noise adds to the mean of their exponentials."""
        logits = self.scale * q @ self.estimated_k.T
        if self.rest is None:
            return logits
        rms = (1 - DISTORTION) * self.scales
        variance = (q / self.rest.weights).pow(2).sum(-1, keepdim=True) * rms.pow(2) * DISTORTION / (1 - DISTORTION)
        return logits - self.scale**2 * variance / 2

    def _looks(self, q: Tensor) -> bool:
        if self.last_q is None:
            return True
        least = min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(q, self.last_q, strict=True))
        self.margins.rho = min(self.margins.rho, abs(least - self.settings.recall_theta))
        return least < self.settings.recall_theta

    def _attend(self, q: Tensor, pages: list[int]) -> tuple[Tensor, Tensor]:
        chosen = [i for page in pages for i in range(page * PAGE, min((page + 1) * PAGE, len(self.k)))]
        if not chosen:
            return torch.zeros_like(q), torch.full((len(q),), -math.inf, dtype=q.dtype)
        logits = self.scale * q @ self.k[chosen].T
        return logits.softmax(-1) @ self.v[chosen], logits.logsumexp(-1)

    def _wanted(self, q: Tensor, kept_lse: Tensor) -> list[int]:
        """Pages to have, the one of largest share first."""
        settings = self.settings
        logits = self._estimates(q)
        masses = torch.stack([page.logsumexp(-1) for page in logits.split(PAGE, dim=-1)], dim=-1)  # [group, pages]
        everything = torch.logaddexp(kept_lse, masses.logsumexp(-1))
        shares = (masses - everything.unsqueeze(-1)).exp()
        self.shares = by_page = shares.max(dim=0).values.tolist()
        order = sorted(range(len(by_page)), key=lambda page: (-by_page[page], page))
        if settings.kv_recall_top_p is None:
            enough = sum(share > settings.recall_eps for share in by_page)
            for share in by_page:
                self._near(share, settings.recall_eps)
        else:
            allowed = 1 - settings.kv_recall_top_p
            enough = 0
            while enough < len(order):
                unread = float(shares[:, order[enough:]].sum(-1).max())
                self._near(unread, allowed)
                if unread <= allowed:
                    break
                enough += 1
        taken = min(enough, settings.recall_pages)
        if 0 < taken < len(order) and (taken < enough or settings.kv_recall_top_p is not None):
            self._near(by_page[order[taken - 1]], by_page[order[taken]])
        if len({*order[:taken], *self.buffer}) > settings.kv_recall_buffer > 0:  # their order decides which stay
            for better, worse in itertools.pairwise(order[:taken]):
                self._near(by_page[better], by_page[worse])
        return order[:taken]

    def _near(self, a: float, b: float) -> None:
        largest = max(abs(a), abs(b))
        if largest > 0:
            self.margins.share = min(self.margins.share, abs(a - b) / largest)


def _rotate(x: Tensor) -> Tensor:
    """Random signs, then the orthonormal Walsh-Hadamard transform, of x [tokens, dim] filled up to a power of two."""
    size = 1 << max(4, (x.shape[-1] - 1).bit_length())
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1])) * _signs(size).to(x.dtype)
    return _walsh_hadamard(x)


def _unrotate(y: Tensor) -> Tensor:
    return _walsh_hadamard(y) * _signs(y.shape[-1]).to(y.dtype)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """Sylvester's order, by butterflies; its own inverse."""
    size, step = x.shape[-1], 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).flatten(-3)
        step *= 2
    return x / math.sqrt(size)


def _signs(size: int) -> Tensor:
    """The top bits of the splitmix64 sequence (state 0x9E3779B97F4A7C15 before the first number); set: plus."""
    state, signs = 0x9E3779B97F4A7C15, []
    for _ in range(size):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        signs.append(1.0 if (z ^ (z >> 31)) >= 2**63 else -1.0)
    return torch.tensor(signs)


def _quantise(y: Tensor) -> Tensor:
    """y [tokens, size] -> what its sketch stands for: two bits per channel, one half-precision scale per token."""
    rows = []
    for row in y:
        code, c = _code_and_scale(row)
        rows.append(c.half().to(row.dtype) * code)
    return torch.stack(rows)


def _code_and_scale(row: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [size] and scale of one rotated key [size]; the scale before it is rounded to half precision."""
    rms = row.norm() / math.sqrt(len(row))
    if rms == 0:
        return torch.full_like(row, INNER), rms
    u = row / rms
    code = torch.where(u.abs() > BOUNDARY, OUTER, INNER).to(row.dtype)
    code = torch.where(u < 0, -code, code)
    return code, rms * (u @ u) / (u @ code)


def _coded_value(row: Tensor, kind: str) -> Tensor:
    """What the code of one rotated value [size] stands for."""
    if kind == "v2":
        code, factor = _code_and_scale(row)
    else:
        code, factor = torch.where(row < 0, -1.0, 1.0).to(row.dtype), row.abs().mean()
    return factor.half().to(row.dtype) * code
