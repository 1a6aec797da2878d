"""The layouts of all codecs as plain numbers: what an operator that reads codes itself has to know.

The bytes they describe are `grouped.py`'s. Read by the C++ operators (ops/native/codecs.py) and the Triton kernels
(ops/triton/encoded.py).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import CODECS, codec_of
from vllm_calidrop.evicted.codecs.fp8 import Fp8
from vllm_calidrop.evicted.codecs.grouped import GroupedCodec


class Layout(NamedTuple):
    """Of one codec; all but pages_per_block are 0 for `none`. Sizes in bytes; is_float, fine: 0 or 1."""

    bits: int
    is_float: int
    fine: int
    outliers: int
    pages_per_block: int
    pages_per_group: int
    pages_per_range: int
    group_bytes: int
    head_bytes: int
    range_bytes: int
    position_bytes: int
    page_bytes: int
    code_bytes: int


@cache
def layouts(head_dim: int, dtype: torch.dtype) -> tuple[Layout, ...]:
    """By the codecs' numbers."""
    return tuple(_layout(name, head_dim, dtype) for name in CODECS)


def layout_table(head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """int32 [codecs, fields of a layout]."""
    return torch.tensor(layouts(head_dim, dtype), dtype=torch.int32, device=device)


def most_outliers() -> int:
    """Outlier tokens of a group, in the codec that has the most."""
    return max(layout.outliers for layout in layouts(64, torch.float32))


def _layout(name: str, head_dim: int, dtype: torch.dtype) -> Layout:
    codec = codec_of(name, head_dim, dtype)
    if not isinstance(codec, GroupedCodec):
        return Layout(**(dict.fromkeys(Layout._fields, 0) | {"pages_per_block": codec.pages_per_block}))
    numbers = {field: getattr(codec, field) for field in Layout._fields if field != "is_float"}
    return Layout(is_float=int(isinstance(codec, Fp8)), **numbers)
