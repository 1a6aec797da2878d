"""The operators in C++, for vLLM's CPU cache as it lies: compiled at first use, the meaning is `ops/reference`'s.

Everything is read by state slot out of the worker's own tables, so a step gathers nothing. Sequences whose codec has no
kernel layout, and those that recall by pages with a codec or a read budget, have no kernel yet: their rows are answered
by the reference operators, row by row; `_prepare` decides it, once a step, from the slot tables.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import layouts
from vllm_calidrop.ops.base import ModelKV, OperatorSet, Tables
from vllm_calidrop.ops.contract import NO_BUDGET, Rows
from vllm_calidrop.ops.cpp import build, library
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference.decode import decode_rows as reference_decode


class CppSet(OperatorSet):
    """`VLLM_CALIDROP_OPS=cpp`, and the default on vLLM's CPU platform."""

    name = "cpp"

    def __init__(self, tables: Tables, model: ModelKV, max_rows: int) -> None:
        super().__init__(tables, model, max_rows)
        found = library.layouts_of(model)
        if found is None:
            raise ValueError(self.refusal(model))
        self._library = library.load()
        self._prepared: _Prepared | None = None
        self._key_layout = found[0]
        self._shared = library.shared_arguments(tables, model, found)
        self._layers = [library.layer_arguments(tables, layer) for layer in range(len(tables.states))]
        known = layouts(model.head_dim, model.dtype)
        self._decoded_first = torch.tensor([layout is None for layout in known])

    @classmethod
    def refusal(cls, model: ModelKV) -> str | None:
        if model.isa is None:
            return "the C++ operators serve vLLM's CPU platform"
        try:
            library.load()
        except build.BuildError as error:
            return f"the C++ operators cannot be compiled here: {error}"
        if library.layouts_of(model) is None:
            return (
                f"the C++ operators do not read vLLM's cache layout {model.isa!r} for {model.dtype}, head_dim "
                f"{model.head_dim} and block size {model.block_size}"
            )
        return None

    def cache_of(self, kv_cache: Tensor) -> PackedCache:
        assert self.model.isa is not None
        return PackedCache(kv_cache, self.model.isa)

    def observe(
        self, sums: Tensor, queries: Tensor, cache: PackedCache, blocks: Tensor, first_position: int, scale: float
    ) -> None:
        model, tensor = self.model, cache.tensor
        queries = _rows_contiguous(queries)
        arguments = library.ColumnArguments(
            dtype=library.DTYPES[queries.dtype],
            key_layout=self._key_layout,
            threads=torch.get_num_threads(),
            amx=self._key_layout == library.KEY_PAIRS
            and model.block_size % 32 == 0
            and model.head_dim % 32 == 0
            and library.has_matrix_unit(),
            queries=len(queries),
            first_position=first_position,
            kv_heads=model.num_kv_heads,
            group=model.group,
            head_dim=model.head_dim,
            block_size=model.block_size,
            scale=scale,
            query=queries.data_ptr(),
            token_stride=queries.stride(0),
            cache=tensor.data_ptr(),
            block_stride=tensor.stride(0),
            head_stride=tensor.stride(1),
            blocks=blocks.data_ptr(),
            sums=sums.data_ptr(),
            sums_stride=sums.stride(0),
        )
        _check(self._library.calidrop_add_column_sums(ctypes.byref(arguments)))

    def take(self, cache: PackedCache, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        index, tensor, offsets = index.contiguous(), cache.tensor, cache.offsets
        keys, values = (tensor.new_empty((*index.shape, cache.head_dim)) for _ in offsets)
        arguments = library.TakeArguments(
            element_bytes=tensor.itemsize,
            threads=torch.get_num_threads(),
            kv_heads=cache.num_kv_heads,
            tokens=index.shape[1],
            head_dim=cache.head_dim,
            block_size=cache.block_size,
            key_offsets=offsets.key.data_ptr(),
            value_offsets=offsets.value.data_ptr(),
            cache=tensor.data_ptr(),
            block_stride=tensor.stride(0),
            head_stride=tensor.stride(1),
            blocks=blocks.data_ptr(),
            index=index.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
        _check(self._library.calidrop_take(ctypes.byref(arguments)))
        return keys, values

    def put(self, cache: PackedCache, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        cache.put(blocks, first_position, keys, values)

    def decode(self, query: Tensor, out: Tensor, cache: PackedCache, layer: int, rows: Rows, scale: float) -> None:
        prepared = self._prepared
        if prepared is None or prepared.rows is not rows:  # the first layer of a step
            prepared = self._prepared = self._prepare(rows)
        if prepared.by_reference is not None:
            reference_decode(query, out, cache, layer, prepared.by_reference, self.tables, scale)
        query, tensor = _rows_contiguous(query), cache.tensor
        step = library.Step(
            rows=prepared.arguments,
            query=query.data_ptr(),
            query_stride=query.stride(0),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            cache=tensor.data_ptr(),
            block_stride=tensor.stride(0),
            head_stride=tensor.stride(1),
            scale=scale,
        )
        call = ctypes.byref(self._shared), ctypes.byref(self._layers[layer]), ctypes.byref(step)
        _check(self._library.calidrop_decode(*call))

    def _prepare(self, rows: Rows) -> _Prepared:
        """What is the same for all layers of a step."""
        sequences, slot = self.tables.sequences, rows.slot.clamp_min(0).long()
        codec = sequences.codec[slot].long()
        recalls_otherwise = (self.tables.recall.stored[slot] > 0) & (
            (codec > 0) | (sequences.most_reads[slot] < NO_BUDGET)
        )
        apart = (rows.slot >= 0) & (recalls_otherwise | self._decoded_first[codec])
        by_kernel, by_reference = rows, None
        if apart.any():
            by_reference = rows._replace(end=rows.end.masked_fill(~apart, 0))
            by_kernel = rows._replace(end=rows.end.masked_fill(apart, 0))
        return _Prepared(rows, by_kernel, library.row_arguments(by_kernel), by_reference)


class _Prepared(NamedTuple):
    """A step's rows; those that the kernel answers (the others are padding there), their addresses; and the others."""

    rows: Rows
    by_kernel: Rows
    arguments: Any
    by_reference: Rows | None


def _rows_contiguous(query: Tensor) -> Tensor:
    """[n, Hq, D] with the heads of a token side by side."""
    return query if query.stride(1) == query.shape[2] and query.stride(2) == 1 else query.contiguous()


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"calidrop: the C++ operators answered {status}; please report this")
