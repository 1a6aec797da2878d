"""What a KV head's evicted tokens become on the host, group by group, and how many bytes they are (docs/swap.md).

``stored_as`` gives the numbers that are read again; nothing is packed into bits here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
BLOCK = 128  # tokens of a swap block without a codec; every codec's block is as many bytes


@dataclass(frozen=True)
class Codec:
    """bits: of a number; group: tokens that share a channel's range; outliers: exact tokens of a group."""

    bits: int
    group: int
    outliers: int
    floating: bool = False

    @property
    def clamps(self) -> bool:
        return self.bits == 2

    def page_bytes(self, dim: int) -> int:
        return PAGE * (2 * math.ceil(dim * self.bits / 8) + 4 + (2 if self.clamps else 0))

    def head_bytes(self, dim: int, item: int) -> int:
        positions = 16 if self.outliers else 0
        return math.ceil((4 * dim + positions + self.outliers * 2 * dim * item) / 16) * 16

    def block_tokens(self, dim: int, item: int) -> int:
        """Whole groups, and one with the pages that still fit."""
        left, tokens = BLOCK * 2 * dim * item, 0
        while left > self.head_bytes(dim, item):
            pages = min(self.group // PAGE, (left - self.head_bytes(dim, item)) // self.page_bytes(dim))
            tokens += pages * PAGE
            left -= self.head_bytes(dim, item) + pages * self.page_bytes(dim)
            if pages < self.group // PAGE:
                break
        return tokens

    def groups(self, tokens: int, dim: int, item: int) -> list[range]:
        """Positions of each group; no group crosses a block's edge."""
        found = []
        block = self.block_tokens(dim, item)
        for start in range(0, tokens, block):
            end = min(start + block, tokens)
            found += [range(first, min(first + self.group, end)) for first in range(start, end, self.group)]
        return found


CODECS = {
    "fp8": Codec(8, 80, 1, floating=True),
    "int8": Codec(8, 80, 1),
    "int4": Codec(4, 112, 2),
    "int2": Codec(2, 112, 2),
    "fp8_plain": Codec(8, 80, 0, floating=True),
    "int8_plain": Codec(8, 80, 0),
    "int4_plain": Codec(4, 112, 0),
    "int2_plain": Codec(2, 112, 0),
}


def read_bytes(name: str, tokens: int, dim: int, item: int) -> int:
    """Bytes of reading all of a KV head's tokens."""
    if name == "none":
        return tokens * 2 * dim * item
    codec = CODECS[name]
    pages = math.ceil(tokens / PAGE) * codec.page_bytes(dim)
    return pages + len(codec.groups(tokens, dim, item)) * codec.head_bytes(dim, item)


def read_page_bytes(name: str, dim: int, item: int) -> int:
    """Bytes of reading one page."""
    if name == "none":
        return PAGE * 2 * dim * item
    return CODECS[name].page_bytes(dim) + CODECS[name].head_bytes(dim, item)


def stored_as(name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One KV head's evicted k and v [m, dim] as they are read again."""
    if name == "none":
        return k, v
    codec, k_read, v_read = CODECS[name], k.clone(), v.clone()
    for group in codec.groups(len(k), k.shape[1], k.element_size()):
        exact = _outliers(k[group.start : group.stop], codec.outliers)
        others = [token for i, token in enumerate(group) if i not in exact]
        if not others:
            continue
        channels = _Range(codec, k[others])
        for token in others:
            coded = channels.coded(k[token])
            gain = _gain(k[token] - channels.offset, coded) if codec.clamps else 1.0
            k_read[token] = coded * gain + channels.offset
        of_tokens = _Range(codec, v[others].T)
        v_read[others] = (of_tokens.coded(v[others].T) + of_tokens.offset).T
    return k_read, v_read


class _Range:
    """Offsets and scales of the columns of x [n, columns]."""

    def __init__(self, codec: Codec, x: Tensor) -> None:
        self.codec = codec
        low, high = x.min(0).values, x.max(0).values
        self.offset = (low / 2 + high / 2).bfloat16().float()
        half = torch.maximum(high - self.offset, self.offset - low)
        if codec.floating:
            self.scale = _up(half / 448)
            return
        step = half * (2 / (2**codec.bits - 1))
        self.scale = _up(step)
        if codec.clamps:
            candidates = [self.scale, *(_up(step * part) for part in (0.9, 0.8, 0.7, 0.6, 0.5))]
            best = torch.stack([self._squares(x, scale) for scale in candidates]).min(0).indices
            self.scale = torch.stack(candidates).gather(0, best.unsqueeze(0))[0]
            self._fit(x)

    def _fit(self, x: Tensor) -> None:
        """Four times a straight line through numbers and what they stand for, each column its own; the best is kept."""
        best, least = (self.offset, self.scale), self._squares(x, self.scale)
        for _ in range(4):
            number = torch.where(self.scale > 0, self.coded(x) / self.scale, 0.0)
            away = number - number.mean(0)
            spread = away.square().mean(0)
            slope = ((away * (x - x.mean(0))).mean(0) / spread).bfloat16().float()
            self.scale = torch.where(spread > 0, slope, self.scale)
            self.offset = (x.mean(0) - self.scale * number.mean(0)).bfloat16().float()
            squares = self._squares(x, self.scale)
            better = squares < least
            best = tuple(torch.where(better, new, old) for new, old in zip((self.offset, self.scale), best))
            least = torch.where(better, squares, least)
        self.offset, self.scale = best

    def _squares(self, x: Tensor, scale: Tensor) -> Tensor:
        self.scale = scale
        return (x - self.offset - self.coded(x)).square().sum(0)

    def coded(self, x: Tensor) -> Tensor:
        """What x's codes stand for, without the offset. A scale of zero: every number is the offset."""
        number = (x - self.offset) / torch.where(self.scale > 0, self.scale, 1.0)
        if self.codec.floating:
            return number.clamp(-448, 448).to(torch.float8_e4m3fn).float() * self.scale
        most = 2**self.codec.bits - 1
        return ((number + most / 2).round().clamp(0, most) - most / 2) * self.scale


def _outliers(keys: Tensor, count: int) -> list[int]:
    """Tokens farthest from the mean key in the channels of the widest range, an eighth of all."""
    width = keys.max(0).values - keys.min(0).values
    channels = sorted(range(len(width)), key=lambda c: -float(width[c]))[: max(1, len(width) // 8)]
    away = (keys[:, channels] - keys[:, channels].mean(0)).norm(dim=1)
    return sorted(range(len(away)), key=lambda t: -float(away[t]))[:count]


def _gain(away: Tensor, coded: Tensor) -> Tensor:
    overlap = float(away @ coded)
    return torch.tensor(min(max(float(away @ away) / overlap, 0.25), 4.0) if overlap > 0 else 1.0).bfloat16().float()


def _up(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x >= 0."""
    rounded = x.bfloat16()
    above = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.float() < x, above, rounded).float()
