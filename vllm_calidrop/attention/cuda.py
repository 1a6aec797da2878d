"""The backend on CUDA: over vLLM's Triton attention.

Why not FlashAttention: Triton's kernels take every layout and block size we want, plan nothing on the host and are
captured in CUDA graphs whatever the batch; and they run under Triton's interpreter, so the very class that serves GPUs
is the one that the tests run.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_calidrop.attention.rows import CaliDropMetadata, CompactedAttention, write_step
from vllm_calidrop.ops.registry import wanted_set
from vllm_calidrop.scheduler import spec as cache_spec
from vllm_calidrop.selection import BACKEND_NAME
from vllm_calidrop.support import KV_CACHE_DTYPES
from vllm_calidrop.worker.prefill import PrefillRow
from vllm_calidrop.worker.worker import CaliDropWorker


class CaliDropCudaBackend(TritonAttentionBackend):
    """What it does not support is said here and in `support.py`."""

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


class CaliDropCudaMetadataBuilder(TritonAttentionMetadataBuilder):
    """Lengths come from the host's own numbers, exact without speculative decoding; the device is never waited for."""

    supports_draft_decode_metadata_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Operators that allocate or wait in every step leave piecewise graphs only."""
        in_graphs = wanted_set().in_graphs
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if in_graphs else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CaliDropMetadata:
        cam = common_attn_metadata
        worker = self._worker()
        if worker is None:  # vLLM measures memory: nothing of ours exists yet
            return CaliDropMetadata(super().build(common_prefix_len, cam, fast_build), None, [])
        # A replayed graph reads the step table and vLLM's buffers; what is returned here is for batches that run.
        num_mine, prefills = self._write_step(worker, cam)
        if num_mine == 0:
            return CaliDropMetadata(super().build(common_prefix_len, cam, fast_build), None, prefills)
        stock = self._whole(worker, cam) if num_mine < cam.num_reqs else None
        return CaliDropMetadata(stock, worker.step.rows(cam.num_reqs, cam.block_table_tensor), prefills)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> CaliDropMetadata:
        """Metadata for a graph that replays batches of any content, so every row may be ours. It is captured with no
        row of ours, as vLLM captures with lengths of 1."""
        cam, worker = common_attn_metadata, self._worker()
        if worker is None:
            stock, decode = super().build(0, cam), None
        else:
            worker.step.clear()
            stock, decode = self._whole(worker, cam), worker.step.rows(cam.num_reqs, cam.block_table_tensor)
        stock.seq_lens.fill_(1)
        return CaliDropMetadata(stock, decode, [])

    @property
    def _replays_graphs(self) -> bool:
        return bool(self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs())

    def _worker(self) -> CaliDropWorker | None:
        layers = self.vllm_config.compilation_config.static_forward_context
        worker: CaliDropWorker | None = layers[self.layer_names[0]].impl.worker
        return worker

    def _whole(self, worker: CaliDropWorker, cam: CommonAttentionMetadata) -> TritonAttentionMetadata:
        """vLLM's metadata of the whole batch, with the lengths of the step table."""
        return super().build(0, cam.replace(seq_lens=worker.step.stock_lens[: cam.num_reqs]))

    def _write_step(self, worker: CaliDropWorker, cam: CommonAttentionMetadata) -> tuple[int, list[PrefillRow]]:
        lengths = cam.seq_lens_cpu_upper_bound
        if lengths is None:
            raise RuntimeError("calidrop: vLLM gave no lengths on the host; please report this")
        return write_step(worker, cam, lengths.numpy()[: cam.num_reqs], always=self._replays_graphs)


class CaliDropCudaImpl(CompactedAttention, TritonAttentionImpl):
    """vLLM's Triton attention; without sequences to compact it is exactly that."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

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
        stock = None if attn_metadata is None else attn_metadata.stock
        if attn_metadata is None or stock is not None:
            super().forward(layer, query, key, value, kv_cache, stock, output, output_scale, output_block_scale)
        if attn_metadata is not None:
            self.compacted(query, kv_cache, attn_metadata, output)
        return output
