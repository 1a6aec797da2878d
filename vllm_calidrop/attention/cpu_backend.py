"""The backend on vLLM's CPU platform."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_calidrop.attention.impl import CaliDropImpl
from vllm_calidrop.attention.metadata import CaliDropMetadataBuilder
from vllm_calidrop.scheduler import spec as cache_spec
from vllm_calidrop.selection import BACKEND_NAME


class CaliDropCpuBackend(CPUAttentionBackend):
    """vLLM's CPU backend with compacted prompts. What it does not support is said here and in `support.py`."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """The CPU operator has a kernel family for multiples of 16 too (vec16), which vLLM's own backend leaves out."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[CaliDropImpl]:
        return CaliDropImpl

    @staticmethod
    def get_builder_cls() -> type[CaliDropMetadataBuilder]:
        return CaliDropMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return cache_spec.customize_spec(spec)

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
    def supports_kv_connector(cls) -> bool:
        return False
