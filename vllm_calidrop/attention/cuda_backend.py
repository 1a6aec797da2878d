"""The backend on CUDA: over vLLM's Triton attention.

Why not FlashAttention: Triton's kernels take every layout and block size we want, plan nothing on the host and are
captured in CUDA graphs whatever the batch; and they run under Triton's interpreter, so the very class that serves GPUs
is the one that the tests run.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_calidrop.attention.cuda_impl import CaliDropCudaImpl
from vllm_calidrop.attention.cuda_metadata import CaliDropCudaMetadataBuilder
from vllm_calidrop.scheduler import spec as cache_spec
from vllm_calidrop.selection import BACKEND_NAME
from vllm_calidrop.support import KV_CACHE_DTYPES


class CaliDropCudaBackend(TritonAttentionBackend):
    """vLLM's Triton backend with compacted prompts. What it does not support is said here and in `support.py`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CaliDropCudaImpl]:
        return CaliDropCudaImpl

    @staticmethod
    def get_builder_cls() -> type[CaliDropCudaMetadataBuilder]:
        return CaliDropCudaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 96, 128, 256]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in cls.get_supported_head_sizes()

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers apart, tokens or heads outside; our kernels go by strides."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return cache_spec.customize_spec(spec)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How a row's tokens are split among programs depends on the size of the batch."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
