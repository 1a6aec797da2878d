"""Codecs of evicted KV by their `kv_codec` name. A name ending in `_plain` is the codec without outlier tokens."""

from __future__ import annotations

from functools import cache

import torch

from vllm_calidrop.evicted.codecs.base import Codec, Encoded
from vllm_calidrop.evicted.codecs.fp8 import Fp8, Fp8Plain
from vllm_calidrop.evicted.codecs.grouped import GroupedCodec
from vllm_calidrop.evicted.codecs.integer import Int2, Int2Plain, Int4, Int4Plain, Int8, Int8Plain
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


@cache
def codec_of(name: str, head_dim: int, dtype: torch.dtype) -> Codec:
    """The codec `name` for a KV cache of this head_dim and dtype."""
    return CODECS[name](head_dim, dtype)


def number_of(name: str) -> int:
    return list(CODECS).index(name)


__all__ = ["CODECS", "Codec", "Encoded", "GroupedCodec", "NoCodec", "codec_of", "number_of"]
