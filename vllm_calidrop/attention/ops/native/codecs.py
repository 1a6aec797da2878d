"""The codecs' layouts as the C++ operators read them (codecs.h)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from vllm_calidrop.cache.codecs import NAMES, GroupedCodec, codec_of
from vllm_calidrop.cache.codecs.fp8 import Fp8

FIELDS = (
    "bits",
    "is_float",
    "gains",
    "outliers",
    "pages_per_block",
    "pages_per_group",
    "group_bytes",
    "head_bytes",
    "position_bytes",
    "page_bytes",
    "code_bytes",
)


class Layout(ctypes.Structure):
    """codecs.h::CodecLayout."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


@cache
def layouts(head_dim: int, dtype: torch.dtype) -> ctypes.Array[Layout]:
    """Of all codecs, by their numbers."""
    found = []
    for name in NAMES:
        codec = codec_of(name, head_dim, dtype)
        layout = Layout(pages_per_block=codec.pages_per_block)
        if isinstance(codec, GroupedCodec):
            layout.is_float = isinstance(codec, Fp8)
            for field in FIELDS:
                if field != "is_float":
                    setattr(layout, field, getattr(codec, field))
        found.append(layout)
    return (Layout * len(found))(*found)
