"""The Triton kernels as an operator set. Under TRITON_INTERPRET=1 it serves CPU tensors, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import Codec, NoCodec
from vllm_calidrop.ops.base import ModelKV, OperatorSet, Tables
from vllm_calidrop.ops.contract import KVCache, Rows, Sequences, State
from vllm_calidrop.ops.strided import kv_views
from vllm_calidrop.ops.triton.calibrate import calibrate
from vllm_calidrop.ops.triton.compact import copy_evicted, gather_kept, scatter_kept
from vllm_calidrop.ops.triton.decode import decode_kept
from vllm_calidrop.ops.triton.encoded import reload_encoded
from vllm_calidrop.ops.triton.merge import merge_row
from vllm_calidrop.ops.triton.reload import reload_evicted
from vllm_calidrop.ops.triton.score import add_column_sums, score_scratch_elements
from vllm_calidrop.ops.triton.scratch import Scratch, make_scratch, scratch_bytes, view_scratch


class TritonSet(OperatorSet):
    """`VLLM_CALIDROP_OPS=triton`, and the default on CUDA."""

    name = "triton"
    VALUES: ClassVar[Mapping[str, tuple[Any, ...]]] = {"kv_recall": ("all",)}
    decodes_first = False
    in_graphs = True

    def __init__(self, tables: Tables, model: ModelKV, max_rows: int) -> None:
        super().__init__(tables, model, max_rows)
        self._heads = (model.num_kv_heads, model.group, model.head_dim)
        self._scratch = make_scratch(max_rows, *self._heads, tables.sequences.start.device)

    @classmethod
    def refusal(cls, model: ModelKV) -> str | None:
        return None if model.isa is None else f"the {cls.name} operators serve CUDA"

    @classmethod
    def scratch_bytes(cls, model: ModelKV, max_rows: int) -> int:
        return scratch_bytes(max_rows, model.num_kv_heads, model.group, model.head_dim)

    def scratch(self, num_rows: int) -> Scratch:
        """The part of the scratch that a batch of `num_rows` rows uses, at the same address in every step."""
        return view_scratch(self._scratch, num_rows, *self._heads)

    def pages(self, layer: int) -> Tensor:
        """One layer of the swap pool as the kernels read it (`reload_evicted`)."""
        return self.tables.pool.device_pages[layer]

    def cache_of(self, kv_cache: Tensor) -> KVCache:
        return kv_views(kv_cache)

    def observe(
        self, sums: Tensor, queries: Tensor, cache: KVCache, blocks: Tensor, first_position: int, scale: float
    ) -> None:
        elements = score_scratch_elements(len(queries), self.model.num_kv_heads, self.model.group)
        scratch = torch.empty(elements, dtype=torch.float32, device=queries.device)
        add_column_sums(sums, queries, cache, blocks, first_position, scale, scratch)

    def take(self, cache: KVCache, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        taken = cache.key.new_empty((2, *index.shape, self.model.head_dim))
        gather_kept(cache, blocks, index.contiguous(), taken)
        return taken[0], taken[1]

    def put(self, cache: KVCache, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        scatter_kept(cache, blocks, first_position, torch.stack((keys, values)))

    def pack(self, cache: KVCache, blocks: Tensor, positions: Tensor, codec: Codec, out: Tensor) -> Tensor:
        if not isinstance(codec, NoCodec):
            return super().pack(cache, blocks, positions, codec, out)
        pages = out.view(self.model.dtype).view(len(out), *self.tables.pool.pages.shape[2:])
        copy_evicted(cache, blocks, positions, pages, torch.arange(len(out), dtype=torch.int32, device=out.device))
        return torch.zeros(self.model.num_kv_heads, dtype=torch.bool, device=out.device)

    def calibrate(
        self, query: Tensor, cache: KVCache, blocks: Tensor, evicted: Tensor, layer: int, slot: int, scale: float
    ) -> None:
        state = self.tables.states[layer]
        calibrate(query, cache, blocks, evicted.contiguous(), state, slot, self.scratch(1), scale)

    def decode(self, query: Tensor, out: Tensor, cache: KVCache, layer: int, rows: Rows, scale: float) -> None:
        decode_step(
            query,
            out,
            cache,
            self.pages(layer),
            rows,
            self.tables.sequences,
            self.tables.states[layer],
            self.scratch(len(rows.slot)),
            scale,
        )


def decode_step(
    query: Tensor, out: Tensor, cache: KVCache, pages: Tensor, rows: Rows, sequences: Sequences, state: State,
    scratch: Scratch, scale: float, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of every row's query, over its kept tokens and by the gate over its evicted ones, into out.

    query: [tokens, Hq, D] and out: [tokens, Hq, D], stride(2) == 1. pages: one layer of the swap pool. lse: float32
    [N, Hq] if wanted. scratch: `view_scratch` for N rows. The launches are ordered by the stream they are put on.
    """
    decode_kept(query, cache, rows, sequences, state, scratch, scale)
    reload_evicted(query, pages, rows, sequences, scratch, scale)
    reload_encoded(query, pages, rows, sequences, scratch, scale)
    merge_row(query, out, rows, sequences, state, scratch, lse)
