"""Integer codes: int8, int4, int2. The numbers are evenly spaced around the middle of a range."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vllm_calidrop.cache.codecs.grouped import GroupedCodec, Quantised, bfloat16_above


class IntegerCodec(GroupedCodec):
    """numbers: -L/2 .. L/2 for codes 0 .. L = 2^bits - 1.

    shrinks: parts of the range that are tried beside the whole: the one of least squared error is taken, and what lies
    beyond it is clamped. With the whole range alone, every value errs by half a scale at most.
    """

    shrinks: ClassVar[tuple[float, ...]] = ()

    def quantise(self, x: Tensor, dim: int, valid: Tensor) -> Quantised:
        low = torch.where(valid, x, torch.inf).amin(dim, keepdim=True)
        high = torch.where(valid, x, -torch.inf).amax(dim, keepdim=True)
        low, high = (torch.where(edge.isinf(), 0.0, edge) for edge in (low, high))  # nothing counts
        offset = (low / 2 + high / 2).to(torch.bfloat16)
        away = x - offset.float()
        step = torch.maximum(high - offset.float(), offset.float() - low) * (2 / self.levels)
        scale = bfloat16_above(step)
        codes = self._codes(away, scale)
        error = self._error(away, codes, scale, dim, valid) if self.shrinks else None
        for shrink in self.shrinks:
            assert error is not None
            narrow = bfloat16_above(step * shrink)
            clamped = self._codes(away, narrow)
            its_error = self._error(away, clamped, narrow, dim, valid)
            better = its_error < error
            codes, scale = torch.where(better, clamped, codes), torch.where(better, narrow, scale)
            error = torch.minimum(its_error, error)
        return Quantised(codes, offset, scale)

    @property
    def levels(self) -> int:
        return int(2**self.bits - 1)

    def _codes(self, away: Tensor, scale: Tensor) -> Tensor:
        codes = torch.where(scale > 0, away / scale.float(), 0.0) + self.levels / 2
        return codes.round().clamp(0, self.levels).to(torch.uint8)

    def _error(self, away: Tensor, codes: Tensor, scale: Tensor, dim: int, valid: Tensor) -> Tensor:
        error = away - scale.float() * self.numbers(codes)
        return torch.where(valid, error.square(), 0.0).sum(dim, keepdim=True)

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
    bits, group_tokens, outliers = 2, 112, 2
    gains = True
    shrinks = (0.9, 0.8, 0.7, 0.6, 0.5)


class Int8Plain(Int8):
    name = "int8_plain"
    outliers = 0


class Int4Plain(Int4):
    name = "int4_plain"
    outliers = 0


class Int2Plain(Int2):
    name = "int2_plain"
    outliers = 0
