"""fp8: numbers of the format e4m3 (float8_e4m3fn) around the middle of the channel's or token's range."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.grouped import GroupedCodec, Quantised, bfloat16_above

LARGEST_E4M3 = 448.0


class Fp8(GroupedCodec):
    """A value errs by 1/16 of its distance from the middle at most, or by 2^-10 of a scale where it is close to it."""

    name = "fp8"
    bits, group_tokens, outliers = 8, 80, 1
    is_float = True

    def quantise(self, x: Tensor, dim: int, valid: Tensor) -> Quantised:
        low = torch.where(valid, x, torch.inf).amin(dim, keepdim=True)
        high = torch.where(valid, x, -torch.inf).amax(dim, keepdim=True)
        low, high = (torch.where(edge.isinf(), 0.0, edge) for edge in (low, high))  # nothing counts
        offset = (low / 2 + high / 2).to(torch.bfloat16)
        middle = offset.float()
        scale = bfloat16_above(torch.maximum(high - middle, middle - low) / LARGEST_E4M3)
        numbers = torch.where(scale > 0, (x - middle) / scale.float(), 0.0).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        return Quantised(numbers.to(torch.float8_e4m3fn).view(torch.uint8), offset, scale)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).float()


class Fp8Plain(Fp8):
    name = "fp8_plain"
    outliers = 0
