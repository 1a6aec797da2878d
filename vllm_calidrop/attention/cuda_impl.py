"""The attention of one layer on CUDA: vLLM's Triton operator, compaction of prompts that are complete, then ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from vllm_calidrop.attention.cuda_metadata import CaliDropCudaMetadata
from vllm_calidrop.ops.gpu import CHOICE_VARIABLE, choice, decode_step_op
from vllm_calidrop.ops.kv_cache import kv_views
from vllm_calidrop.ops.triton import Rows
from vllm_calidrop.support import UnsupportedError, refuse_layer
from vllm_calidrop.worker.cuda_compaction import compact, observe_chunk
from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
from vllm_calidrop.worker.prefill import PrefillRow


class CaliDropCudaImpl(TritonAttentionImpl):
    """vLLM's Triton attention; without sequences to compact it is exactly that.

    worker, index: given once ours exists (`attach`), which is before CUDA graphs are captured.
    """

    worker: CaliDropCudaWorker | None = None
    index: int = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)
        self._decode_step = decode_step_op()

    def attach(self, worker: CaliDropCudaWorker, index: int, kv_cache: Tensor) -> None:
        """kv_cache: the layer's, as `forward` gets it."""
        if choice() == "xformers":
            from vllm_calidrop.ops import xformers

            reason = xformers.refusal(worker.table.query.dtype, self.head_size, kv_views(kv_cache))
            if reason is not None:
                raise UnsupportedError([f"{reason} ({CHOICE_VARIABLE}=xformers)"])
        self.worker, self.index = worker, index

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CaliDropCudaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output: [tokens, Hq, D]; kv_cache: [blocks, H, block_size, 2 * D], new K and V already in it."""
        stock = None if attn_metadata is None else attn_metadata.stock
        if attn_metadata is None or stock is not None:
            super().forward(layer, query, key, value, kv_cache, stock, output, output_scale, output_block_scale)
        if attn_metadata is None:
            return output
        if attn_metadata.prefills:
            self._compact(query, kv_cache, attn_metadata.prefills)
        if attn_metadata.decode is not None:
            self._decode(query, kv_cache, attn_metadata.decode, output)
        return output

    def _compact(self, query: Tensor, kv_cache: Tensor, prefills: list[PrefillRow]) -> None:
        worker = self.worker
        assert worker is not None
        cache = kv_views(kv_cache)
        for row in prefills:
            chunk = query[row.first_token : row.first_token + row.length]
            observe_chunk(row, self.index, chunk, cache, self.scale)
            if row.completes:
                selection = compact(row, self.index, chunk[-1], cache, worker, self.scale)
                if worker.on_compaction is not None:
                    worker.on_compaction(row.sequence.record, self.index, selection)

    def _decode(self, query: Tensor, kv_cache: Tensor, rows: Rows, output: Tensor) -> None:
        worker = self.worker
        assert worker is not None
        self._decode_step(
            query,
            output,
            kv_views(kv_cache),
            worker.pages(self.index),
            rows,
            worker.slots.sequences,
            worker.state(self.index),
            worker.scratch(rows.slot.shape[0]),
            self.scale,
        )
