"""The operators in torch: readable, for every platform, and what the other sets are compared with.

It serves everything that the contract knows. On a GPU it waits for the device in every step, so it is for tests and for
looking at a case, not for serving.
"""

from __future__ import annotations

from torch import Tensor

from vllm_calidrop.algorithm.policies import h2o
from vllm_calidrop.ops.base import OperatorSet
from vllm_calidrop.ops.contract import Rows
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference.decode import decode_rows
from vllm_calidrop.ops.strided import StridedCache

Cache = PackedCache | StridedCache


class ReferenceSet(OperatorSet):
    """`VLLM_CALIDROP_OPS=reference`, and what serves a CPU without a compiler."""

    name = "reference"

    def cache_of(self, kv_cache: Tensor) -> Cache:
        return StridedCache(kv_cache) if self.model.isa is None else PackedCache(kv_cache, self.model.isa)

    def observe(
        self, sums: Tensor, queries: Tensor, cache: Cache, blocks: Tensor, first_position: int, scale: float
    ) -> None:
        tokens = first_position + len(queries)
        keys, _ = cache.read(blocks[None, : -(-tokens // cache.block_size)])
        h2o.add_column_sums(sums, queries, keys[0, :, :tokens], first_position, scale)

    def take(self, cache: Cache, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return cache.take(blocks, index)

    def put(self, cache: Cache, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        cache.put(blocks, first_position, keys, values)

    def decode(self, query: Tensor, out: Tensor, cache: Cache, layer: int, rows: Rows, scale: float) -> None:
        decode_rows(query, out, cache, layer, rows, self.tables, scale)
