"""vLLM's paged cache on CUDA as our operators take it. Whichever layout it has is in the strides."""

from __future__ import annotations

from torch import Tensor

from vllm_calidrop.ops.triton import KVCache


def kv_views(kv_cache: Tensor) -> KVCache:
    """kv_cache: [blocks, H, block_size, 2 * D], K and V of a token side by side in the last dimension."""
    head_dim = kv_cache.shape[-1] // 2
    return KVCache(kv_cache[..., :head_dim], kv_cache[..., head_dim:])
