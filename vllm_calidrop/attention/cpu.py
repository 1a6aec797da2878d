"""The backend on vLLM's CPU platform: vLLM's CPU attention with compacted prompts."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_calidrop.attention.rows import CaliDropMetadata, CompactedAttention, write_step
from vllm_calidrop.scheduler import spec as cache_spec
from vllm_calidrop.selection import BACKEND_NAME
from vllm_calidrop.worker.worker import active_worker


class CaliDropCpuBackend(CPUAttentionBackend):
    """What it does not support is said here and in `support.py`."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """The CPU operator has a kernel family for multiples of 16 too (vec16), which vLLM's own backend leaves out."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[CaliDropCpuImpl]:
        return CaliDropCpuImpl

    @staticmethod
    def get_builder_cls() -> type[CaliDropCpuMetadataBuilder]:
        return CaliDropCpuMetadataBuilder

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


class CaliDropCpuMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's metadata; where rows are ours, with the lengths of the step table."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CaliDropMetadata:
        cam, worker = common_attn_metadata, active_worker()
        if worker is None:
            return CaliDropMetadata(super().build(common_prefix_len, cam, fast_build), None, [])
        num_mine, prefills = write_step(worker, cam, cam.seq_lens[: cam.num_reqs].numpy())
        if num_mine == 0:
            return CaliDropMetadata(super().build(common_prefix_len, cam, fast_build), None, prefills)
        stock = None
        if num_mine < cam.num_reqs:
            stock = super().build(0, cam.replace(seq_lens=worker.step.stock_lens[: cam.num_reqs]), fast_build)
        return CaliDropMetadata(stock, worker.step.rows(cam.num_reqs, cam.block_table_tensor), prefills)


class CaliDropCpuImpl(CompactedAttention, CPUAttentionBackendImpl):
    """vLLM's CPU attention; without sequences to compact it is exactly that."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CaliDropMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            return output
        stock = attn_metadata.stock
        if stock is not None:
            super().forward(layer, query, key, value, kv_cache, stock, output, output_scale, output_block_scale)
        self.compacted(query, kv_cache, attn_metadata, output)
        return output
