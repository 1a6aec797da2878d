"""What the scheduler's half must know of the model and of vLLM's KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_calidrop.algorithm.shape import KVShape
from vllm_calidrop.evicted.codecs import Codec, codec_of


@dataclass(frozen=True)
class Shape(KVShape):
    """block_size: tokens of a KV block. ranks: how many there are (tensor parallel), each with this shape."""

    block_size: int
    ranks: int = 1

    def codec(self, name: str) -> Codec:
        return codec_of(name, self.head_dim, self.dtype)
