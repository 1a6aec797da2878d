"""Recall by pages in C++: same meaning and signature as `ops/recall.py`, reading everything where it lies."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.sketch import LEVELS, padded_dim, signs
from vllm_calidrop.evicted.recall.store import RecallRows, RecallStore
from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.reference import recall as in_torch
from vllm_calidrop.worker.state_table import StateTable


class _Arguments(ctypes.Structure):
    """recall.cpp::RecallArguments, where the fields are explained."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "threads", "rows", "kv_heads", "group", "head_dim")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("query", "out", "lse", "row", "slots", "theta", "eps", "top_p")),
        *((name, ctypes.c_void_p) for name in ("most", "buffer_size", "stored")),
        *((name, ctypes.c_void_p) for name in ("swap_blocks", "sketch_blocks", "buffer_ids")),
        *((name, ctypes.c_int64) for name in ("swap_stride", "sketch_stride", "buffer_stride")),
        ("pages", ctypes.c_void_p),
        ("pages_per_block", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "mu", "looked", "buffer", "held", "rank", "signs")),
        ("padded_dim", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("inner", "outer")),
        *((name, ctypes.c_void_p) for name in ("state_query", "state_out", "state_lse", "counts")),
        ("counts_stride", ctypes.c_int64),
    ]


@cache
def _operator() -> Any:
    return operator_of(native.load())


def operator_of(library: ctypes.CDLL) -> Any:
    library.calidrop_recall.argtypes = [ctypes.POINTER(_Arguments)]
    library.calidrop_recall_arguments_bytes.restype = ctypes.c_int64
    assert library.calidrop_recall_arguments_bytes() == ctypes.sizeof(_Arguments)
    return library.calidrop_recall


def add_recalled(
    rows: RecallRows,
    layer: int,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    pool: SwapPool,
    table: StateTable,
    store: RecallStore,
    scale: float,
) -> None:
    """Merge what M of a step's N rows recall into their state over the kept tokens: out [N, Hq, D], lse [N, Hq].

    queries: [N, Hq, D]. `out` becomes the rows' attention, `lse` stays.
    """
    head_dim = queries.shape[-1]
    dtypes = {queries.dtype, pool.pages.dtype, table.query.dtype, store.buffer.dtype}
    unknown = len(dtypes) > 1 or queries.dtype not in native.DTYPES or head_dim % native.LANES != 0
    if unknown or rows.codec is not None or rows.most_reads is not None:
        return in_torch.add_recalled(rows, layer, queries, out, lse, pool, table, store, scale)
    assert out.is_contiguous() and lse.is_contiguous()
    queries = queries.contiguous()
    arguments = _arguments_of(rows)
    kv_heads = table.query.shape[2]
    arguments.dtype, arguments.scale = native.DTYPES[queries.dtype], scale
    arguments.kv_heads, arguments.group, arguments.head_dim = kv_heads, queries.shape[1] // kv_heads, head_dim
    arguments.query, arguments.out, arguments.lse = queries.data_ptr(), out.data_ptr(), lse.data_ptr()
    arguments.pages, arguments.pages_per_block = pool.pages[layer].data_ptr(), pool.pages.shape[3]
    for name in ("codes", "scales", "mu", "looked", "buffer", "held", "rank"):
        setattr(arguments, name, getattr(store, name)[layer].data_ptr())
    turns = signs(padded_dim(head_dim))
    arguments.signs, arguments.padded_dim = turns.data_ptr(), len(turns)
    for name in ("query", "out", "lse"):
        setattr(arguments, f"state_{name}", getattr(table, name)[layer].data_ptr())
    arguments.counts, arguments.counts_stride = table.counts[:, layer].data_ptr(), table.counts.stride(0)
    status = _operator()(ctypes.byref(arguments))
    assert status == 0, status


def _arguments_of(rows: RecallRows) -> Any:
    """What is the same for all layers of a step, kept with the step's rows."""
    if rows.native is None:
        tables = (rows.swap_blocks, rows.sketch_blocks, rows.buffer_ids)
        assert all(table.shape[1] == 0 or table.stride(1) == 1 for table in tables)
        rows.native = _Arguments(
            threads=torch.get_num_threads(),
            rows=len(rows.rows),
            row=rows.rows.data_ptr(),
            swap_stride=rows.swap_blocks.stride(0),
            sketch_stride=rows.sketch_blocks.stride(0),
            buffer_stride=rows.buffer_ids.stride(0),
            inner=LEVELS[0],
            outer=LEVELS[1],
            **{
                name: getattr(rows, name).data_ptr()
                for name in ("slots", "theta", "eps", "top_p", "most", "buffer_size", "stored")
            },
            **{name: getattr(rows, name).data_ptr() for name in ("swap_blocks", "sketch_blocks", "buffer_ids")},
        )
    return rows.native
