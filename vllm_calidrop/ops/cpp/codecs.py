"""The codecs' layouts as the C++ operators read them (codecs.h)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from vllm_calidrop.evicted.codecs import layout


class Layout(ctypes.Structure):
    """codecs.h::CodecLayout."""

    _fields_ = [(name, ctypes.c_int64) for name in layout.Layout._fields]


@cache
def layouts(head_dim: int, dtype: torch.dtype) -> ctypes.Array[Layout]:
    """Of all codecs, by their numbers."""
    found = [Layout(*numbers) for numbers in layout.layouts(head_dim, dtype)]
    return (Layout * len(found))(*found)
