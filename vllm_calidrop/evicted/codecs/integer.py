"""Integer codes: int8, int4, int2. The numbers are evenly spaced around the middle of a range."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.grouped import GroupedCodec, Quantised, bfloat16_above, coarse_above, coarse_nearest


class IntegerCodec(GroupedCodec):
    """numbers: -L/2 .. L/2 for codes 0 .. L = 2^bits - 1.

    shrinks: parts of the range that are tried beside the whole: the one of least squared error is taken, and what lies
    beyond it is clamped. With the whole range alone, every value errs by half a scale at most. refits: how often offset
    and scale are then fitted to the codes (least squares) and the codes to them; what errs less is taken.
    """

    shrinks: ClassVar[tuple[float, ...]] = ()
    refits: ClassVar[int] = 0

    def quantise(self, x: Tensor, dim: int, valid: Tensor) -> Quantised:
        low = torch.where(valid, x, torch.inf).amin(dim, keepdim=True)
        high = torch.where(valid, x, -torch.inf).amax(dim, keepdim=True)
        low, high = (torch.where(edge.isinf(), 0.0, edge) for edge in (low, high))  # nothing counts
        offset = (low / 2 + high / 2).to(torch.bfloat16)
        step = torch.maximum(high - offset.float(), offset.float() - low) * (2 / self.levels)
        above = coarse_above if self.fine else bfloat16_above
        best = self._coded(x, offset, above(step))
        for shrink in self.shrinks:
            best = self._better(x, best, self._coded(x, offset, above(step * shrink)), dim, valid)
        last = best
        for _ in range(self.refits):
            last = self._coded(x, *self._fitted(x, last, dim, valid))
            best = self._better(x, best, last, dim, valid)
        return best

    def _coded(self, x: Tensor, offset: Tensor, scale: Tensor) -> Quantised:
        codes = torch.where(scale > 0, (x - offset.float()) / scale.float(), 0.0) + self.levels / 2
        return Quantised(codes.round().clamp(0, self.levels).to(torch.uint8), offset, scale)

    def _fitted(self, x: Tensor, quantised: Quantised, dim: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale of least squared error for the codes; the scale stays where all codes are one."""

        def mean(of: Tensor) -> Tensor:
            return torch.where(valid, of, 0.0).sum(dim, keepdim=True) / count

        count = valid.expand_as(x).sum(dim, keepdim=True).clamp(min=1)
        numbers = self.numbers(quantised.codes)
        middle, at = mean(x), mean(numbers)
        spread = mean((numbers - at).square())
        fitted = mean((numbers - at) * (x - middle)) / torch.where(spread > 0, spread, 1.0)
        rounded = coarse_nearest(fitted.clamp(min=0)) if self.fine else fitted.to(torch.bfloat16)
        scale = torch.where(spread > 0, rounded, quantised.scale)
        return (middle - scale.float() * at).to(torch.bfloat16), scale

    def _better(self, x: Tensor, one: Quantised, other: Quantised, dim: int, valid: Tensor) -> Quantised:
        """The one of the two with the smaller squared error; `one` where they are equal."""

        def error(of: Quantised) -> Tensor:
            back = of.offset.float() + of.scale.float() * self.numbers(of.codes)
            return torch.where(valid, (x - back).square(), 0.0).sum(dim, keepdim=True)

        better = error(other) < error(one)
        return Quantised(*(torch.where(better, new, old) for new, old in zip(other, one, strict=True)))

    @property
    def levels(self) -> int:
        return int(2**self.bits - 1)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.float() - self.levels / 2


class Int8(IntegerCodec):
    name = "int8"
    bits, group_tokens, outliers = 8, 80, 1


class Int4(IntegerCodec):
    name = "int4"
    bits, group_tokens, outliers = 4, 112, 2


class Int2(IntegerCodec):
    name = "int2"
    bits, group_tokens, outliers = 2, 192, 3
    ranges, fine = 4, True
    shrinks = (0.9, 0.8, 0.7, 0.6, 0.5)
    refits = 4


class Int8Plain(Int8):
    name = "int8_plain"
    outliers = 0


class Int4Plain(Int4):
    name = "int4_plain"
    outliers = 0


class Int2Plain(Int2):
    name = "int2_plain"
    outliers = 0
