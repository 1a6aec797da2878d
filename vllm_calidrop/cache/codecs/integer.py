"""Integer codes: int8, int4, int2. The numbers are evenly spaced around the middle of a range."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vllm_calidrop.cache.codecs.grouped import GroupedCodec, Quantised, bfloat16_above


class IntegerCodec(GroupedCodec):
    """numbers: -L/2 .. L/2 for codes 0 .. L = 2^bits - 1.

    shrinks: parts of the range that are tried; the one of least squared error is taken, and what lies beyond it is
    clamped. With the whole range alone, every value errs by half a scale at most.
    """

    shrinks: ClassVar[tuple[float, ...]] = (1.0,)

    def quantise(self, x: Tensor, dim: int, valid: Tensor) -> Quantised:
        levels = 2**self.bits - 1
        low = torch.where(valid, x, torch.inf).amin(dim, keepdim=True)
        high = torch.where(valid, x, -torch.inf).amax(dim, keepdim=True)
        low, high = (torch.where(edge.isinf(), 0.0, edge) for edge in (low, high))  # nothing counts
        offset = (low / 2 + high / 2).to(torch.bfloat16)
        away = x - offset.float()
        half = torch.maximum(high - offset.float(), offset.float() - low)
        best_error, best = None, None
        for shrink in self.shrinks:
            scale = bfloat16_above(half * (shrink * 2 / levels))
            codes = (torch.where(scale > 0, away / scale.float(), 0.0) + levels / 2).round().clamp(0, levels)
            found = (codes, scale)
            if len(self.shrinks) > 1:
                error = torch.where(valid, away - scale.float() * (codes - levels / 2), 0.0)
                error = error.square().sum(dim, keepdim=True)
                if best_error is not None and best is not None:
                    better = error < best_error
                    found = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
                    error = torch.minimum(error, best_error)
                best_error = error
            best = found
        assert best is not None
        return Quantised(best[0].to(torch.uint8), offset, best[1])

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.float() - (2**self.bits - 1) / 2


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
    shrinks = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


class Int8Plain(Int8):
    name = "int8_plain"
    outliers = 0


class Int4Plain(Int4):
    name = "int4_plain"
    outliers = 0


class Int2Plain(Int2):
    name = "int2_plain"
    outliers = 0
