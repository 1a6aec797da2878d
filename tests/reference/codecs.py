"""What a KV head's evicted tokens become on the host, group by group, and how many bytes they are (docs/swap.md).

``stored_as`` gives the numbers that are read again; nothing is packed into bits here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
BLOCK = 128  # tokens of a swap block without a codec; every codec's block is as many bytes


@dataclass(frozen=True)
class Codec:
    """bits: of a number; group: tokens with as many exact ones as `outliers`; ranges: parts of a group, in each of
    which a channel has an offset and a scale."""

    bits: int
    group: int
    outliers: int
    floating: bool = False
    ranges: int = 1

    @property
    def clamps(self) -> bool:
        return self.bits == 2

    def page_bytes(self, dim: int) -> int:
        return PAGE * (2 * math.ceil(dim * self.bits / 8) + 4 + (1 if self.clamps else 0))

    def head_bytes(self, dim: int, item: int) -> int:
        channels = self.ranges * (3 if self.clamps else 4) * dim
        positions = 16 if self.outliers or self.clamps else 0
        return math.ceil((channels + positions + self.outliers * 2 * dim * item) / 16) * 16

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
    "int2": Codec(2, 192, 3, ranges=4),
    "fp8_plain": Codec(8, 80, 0, floating=True),
    "int8_plain": Codec(8, 80, 0),
    "int4_plain": Codec(4, 112, 0),
    "int2_plain": Codec(2, 192, 0, ranges=4),
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
        for first in range(group.start, group.stop, codec.group // codec.ranges):
            here = [token for token in others if first <= token < first + codec.group // codec.ranges]
            if not here:
                continue
            channels = _Range(codec, k[here])
            if codec.clamps:
                channels.scale = _of_few_exponents(channels.scale)
            for token in here:
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
            candidates = [_to_sixteenths(step * part, torch.ceil) for part in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]
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
            slope = (away * (x - x.mean(0))).mean(0) / spread
            self.scale = torch.where(spread > 0, _to_sixteenths(slope.nan_to_num(0.0), _half_up), self.scale)
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


def _gain(away: Tensor, coded: Tensor) -> float:
    """In steps of 1 / 128, of which 256 are told apart."""
    overlap = float(away @ coded)
    steps = round(float(away @ away) / overlap * 128) if overlap > 0 else 128
    return min(max(steps, 64), 319) / 128


def _to_sixteenths(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """x >= 0 with a mantissa of 16ths."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(rounded(mantissa * 32), exponent - 5).float()


def _half_up(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def _of_few_exponents(scale: Tensor) -> Tensor:
    """Scales of a range: what is 2^15 times smaller than the largest one's power of two counts as zero."""
    _, exponent = torch.frexp(scale.max())
    return torch.where(scale > 2.0 ** (int(exponent) - 1 - 15), scale, 0.0)


def _up(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x >= 0."""
    rounded = x.bfloat16()
    above = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.float() < x, above, rounded).float()
