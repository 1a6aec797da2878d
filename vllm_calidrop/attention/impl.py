"""The attention of one layer: vLLM's operator for prompts and full KV, then compaction, then compacted decode."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_calidrop.attention.metadata import CaliDropMetadata, DecodeRows
from vllm_calidrop.ops.choice import decode_op, recall_op
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.support import refuse_layer
from vllm_calidrop.worker.compaction import compact, observe_chunk
from vllm_calidrop.worker.worker import CaliDropWorker, active_worker


class CaliDropImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention; without sequences to compact it is exactly that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)
        self._decode = decode_op()
        self._recall = recall_op()
        self._cache: PackedCache | None = None

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
        """query, output: [tokens, Hq, D]; kv_cache: [blocks, H, block_size, 2 * D], new K and V already in it."""
        if attn_metadata is None:
            return output
        self._stock(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if attn_metadata.prefills or attn_metadata.decode is not None:
            worker = active_worker()
            assert worker is not None
            self._compacted(worker, layer, query, kv_cache, attn_metadata, output)
        return output

    def _stock(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: CaliDropMetadata,
        output: Tensor, *scales: Tensor | None,
    ) -> None:  # fmt: skip
        if metadata.stock is None:
            return
        tokens = metadata.stock_tokens
        if tokens is None:
            super().forward(layer, query, key, value, kv_cache, metadata.stock, output, *scales)
            return
        if isinstance(tokens, slice):
            super().forward(layer, query[tokens], key, value, kv_cache, metadata.stock, output[tokens], *scales)
            return
        part = output.new_empty((len(tokens), *output.shape[1:]))
        super().forward(layer, query[tokens], key, value, kv_cache, metadata.stock, part, *scales)
        output[tokens] = part

    def _compacted(
        self,
        worker: CaliDropWorker,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        metadata: CaliDropMetadata,
        output: Tensor,
    ) -> None:
        index = worker.layer_index[layer.layer_name]
        cache = self._cache
        if cache is None or cache.tensor is not kv_cache:
            cache = self._cache = PackedCache(kv_cache, layer.isa)
        for row in metadata.prefills:
            chunk = query[row.first_token : row.first_token + row.length]
            observe_chunk(row, index, chunk, cache, self.scale)
            if row.completes:
                started = perf_counter()
                selection = compact(row, index, chunk[-1], cache, worker.pool, worker.table, worker.recall, self.scale)
                worker.layer_compacted(row.sequence, index, perf_counter() - started)
                if worker.on_compaction is not None:
                    worker.on_compaction(row.sequence.record, index, selection)
        rows = metadata.decode
        if rows is None:
            return
        places = rows.places
        if rows.recalled is None and isinstance(places, slice):
            queries, out = query[places], output[places]
            self._decode(rows, index, queries, cache, worker.pool, worker.table, self.scale, out=out)
        else:
            output[places] = self._decoded(worker, index, query[places], cache, rows).to(output.dtype)

    def _decoded(
        self, worker: CaliDropWorker, index: int, queries: Tensor, cache: PackedCache, rows: DecodeRows
    ) -> Tensor:
        """float32 [N, Hq, D]: attention of the rows' queries [N, Hq, D]."""
        lse = None if rows.recalled is None else torch.empty(queries.shape[:2], dtype=torch.float32)
        out = self._decode(rows, index, queries, cache, worker.pool, worker.table, self.scale, lse)
        if rows.recalled is not None and lse is not None:
            self._recall(rows.recalled, index, queries, out, lse, worker.pool, worker.table, worker.recall, self.scale)
        return out
