"""Codecs of evicted KV by their `kv_codec` name. A name ending in `_plain` is the codec without outlier tokens."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.base import Codec, Encoded
from vllm_calidrop.evicted.codecs.fp8 import Fp8, Fp8Plain
from vllm_calidrop.evicted.codecs.grouped import GroupedCodec
from vllm_calidrop.evicted.codecs.integer import Int2, Int2Plain, Int4, Int4Plain, Int8, Int8Plain
from vllm_calidrop.evicted.codecs.layout import Layout
from vllm_calidrop.evicted.codecs.none import NoCodec

# The order is the codecs' number in the workers' tables and in the operators; `none` is 0.
CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        NoCodec,
        Fp8,
        Int8,
        Int4,
        Int2,
        Fp8Plain,
        Int8Plain,
        Int4Plain,
        Int2Plain,
    )
}


def codec_of(name: str, head_dim: int, dtype: torch.dtype) -> Codec:
    """The codec `name` for a KV cache of this head_dim and dtype. ValueError where it breaks the contract."""
    return _built(CODECS[name], head_dim, dtype)


@cache
def _built(kind: type[Codec], head_dim: int, dtype: torch.dtype) -> Codec:
    codec = kind(head_dim, dtype)
    codec.check()
    return codec


def has_kernel_layout(name: str) -> bool:
    """Whether kernels read the codec themselves; so for every head_dim and dtype, or for none."""
    return codec_of(name, 64, torch.float32).kernel_layout() is not None


def layouts(head_dim: int, dtype: torch.dtype) -> tuple[Layout | None, ...]:
    """All codecs for a KV cache of this head_dim and dtype, in the order of their numbers."""
    return tuple(codec_of(name, head_dim, dtype).kernel_layout() for name in CODECS)


def layout_table(head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """int32 [codecs, fields of a layout]; zeros for a codec without one, which no kernel may be asked to read."""
    nothing = (0,) * len(Layout._fields)
    return torch.tensor([of or nothing for of in layouts(head_dim, dtype)], dtype=torch.int32, device=device)


def number_of(name: str) -> int:
    return list(CODECS).index(name)


__all__ = [
    "CODECS",
    "Codec",
    "Encoded",
    "GroupedCodec",
    "Layout",
    "NoCodec",
    "codec_of",
    "has_kernel_layout",
    "layout_table",
    "layouts",
    "number_of",
]
