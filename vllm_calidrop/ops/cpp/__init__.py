"""The decode operator in C++: same meaning and signature as `ops/cpu.py::decode`, reading everything where it lies."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.cpp import build, codecs
from vllm_calidrop.ops.packed import PackedCache, block_offsets
from vllm_calidrop.ops.reference import decode as cpu
from vllm_calidrop.worker.measures import SIMILARITY_BOUNDS
from vllm_calidrop.worker.state_table import StateTable

LANES = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KEY_TRANSPOSED, KEY_PAIRS = 0, 1
VALUE_PLAIN, VALUE_PAIRS = 0, 1


class _Arguments(ctypes.Structure):
    """decode.cpp::Arguments, where the fields are explained."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "key_layout", "value_layout", "threads")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "group", "head_dim", "block_size")),
        ("scale", ctypes.c_double),
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_stride", "out_float32")),
        *((name, ctypes.c_void_p) for name in ("lse", "cache")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        ("blocks", ctypes.c_void_p),
        ("blocks_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("start", "end")),
        ("calibrated_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("calibrated", "slots", "theta1", "theta2", "gate", "swap_blocks")),
        ("swap_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("stored", "codec", "most_reads", "pages")),
        *((name, ctypes.c_int64) for name in ("pages_per_block", "block_bytes")),
        *((name, ctypes.c_void_p) for name in ("codecs", "state_query", "state_out", "state_lse", "counts")),
        ("counts_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("similarity_bounds", "similarity")),
        ("similarity_buckets", ctypes.c_int64),
    ]


class _ColumnArguments(ctypes.Structure):
    """columns.cpp::ColumnArguments, where the fields are explained."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "key_layout", "threads", "amx")),
        *((name, ctypes.c_int64) for name in ("queries", "first_position", "kv_heads", "group", "head_dim")),
        ("block_size", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("query", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("blocks", "sums")),
        ("sums_stride", ctypes.c_int64),
    ]


@cache
def load() -> ctypes.CDLL:
    """The compiled library; raises `build.BuildError` where it cannot be had."""
    try:
        library = ctypes.CDLL(str(build.library()))
    except OSError as error:
        raise build.BuildError(str(error)) from error
    library.calidrop_decode.argtypes = [ctypes.POINTER(_Arguments)]
    library.calidrop_arguments_bytes.restype = ctypes.c_int64
    assert library.calidrop_arguments_bytes() == ctypes.sizeof(_Arguments)
    library.calidrop_add_column_sums.argtypes = [ctypes.POINTER(_ColumnArguments)]
    library.calidrop_column_arguments_bytes.restype = ctypes.c_int64
    assert library.calidrop_column_arguments_bytes() == ctypes.sizeof(_ColumnArguments)
    return library


def decode(
    rows: DecodeRows,
    layer: int,
    queries: Tensor,
    cache: PackedCache,
    pool: SwapPool,
    table: StateTable,
    scale: float,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Algorithm 2 for all rows of one layer. queries: [N, Hq, D]; returns [N, Hq, D]: `out` if given, else float32.

    lse: float32 [N, Hq], filled with the log-sum-exp of all that was attended if given.
    """
    layouts = _layouts(cache.isa, cache.block_size, cache.head_dim, cache.tensor.dtype)
    dtypes = {queries.dtype, cache.tensor.dtype, pool.pages.dtype, table.query.dtype}
    if layouts is None or len(dtypes) > 1:
        return cpu.decode(rows, layer, queries, cache, pool, table, scale, lse, out)
    if queries.stride(1) != cache.head_dim or queries.stride(2) != 1:
        queries = queries.contiguous()
    if out is None:
        out = torch.empty(queries.shape, dtype=torch.float32)
    assert out.stride(1) == cache.head_dim and out.stride(2) == 1 and out.dtype in (torch.float32, queries.dtype)
    arguments = _arguments_of(rows)
    _fill_layer(arguments, layer, queries, out, cache, pool, table)
    arguments.key_layout, arguments.value_layout = layouts
    arguments.scale = scale
    arguments.lse = None if lse is None else lse.data_ptr()
    status = load().calidrop_decode(ctypes.byref(arguments))
    assert status == 0, status
    return out


def add_column_sums(
    sums: Tensor, queries: Tensor, blocks: Tensor, cache: PackedCache, first_position: int, scale: float
) -> None:
    """As `ops/cpu.py::add_column_sums`, with the keys read in their blocks."""
    layouts = _layouts(cache.isa, cache.block_size, cache.head_dim, cache.tensor.dtype)
    if layouts is None or queries.dtype != cache.tensor.dtype:
        return cpu.add_column_sums(sums, queries, blocks, cache, first_position, scale)
    if queries.stride(1) != cache.head_dim or queries.stride(2) != 1:
        queries = queries.contiguous()
    assert blocks.dtype == torch.int32 and blocks.stride(0) == 1 and sums.stride(1) == 1
    assert blocks.numel() * cache.block_size >= first_position + len(queries) <= sums.shape[1]
    arguments = _ColumnArguments(
        dtype=DTYPES[queries.dtype],
        key_layout=layouts[0],
        threads=torch.get_num_threads(),
        amx=layouts[0] == KEY_PAIRS and cache.block_size % 32 == 0 and cache.head_dim % 32 == 0 and _matrix_unit(),
        queries=len(queries),
        first_position=first_position,
        kv_heads=cache.num_kv_heads,
        group=queries.shape[1] // cache.num_kv_heads,
        head_dim=cache.head_dim,
        block_size=cache.block_size,
        scale=scale,
        query=queries.data_ptr(),
        token_stride=queries.stride(0),
        cache=cache.tensor.data_ptr(),
        block_stride=cache.tensor.stride(0),
        head_stride=cache.tensor.stride(1),
        blocks=blocks.data_ptr(),
        sums=sums.data_ptr(),
        sums_stride=sums.stride(0),
    )
    status = load().calidrop_add_column_sums(ctypes.byref(arguments))
    assert status == 0, status


@cache
def _matrix_unit() -> bool:
    """Whether the library was built with AMX and the system lets this process use it."""
    return bool(load().calidrop_has_amx()) and bool(torch.cpu._init_amx())


def _arguments_of(rows: DecodeRows) -> Any:
    """What is the same for all layers of a step, kept with the step's rows."""
    known = rows.native
    if known is not None:
        return known
    assert rows.blocks.dtype == torch.int32 and rows.blocks.stride(1) == 1
    rows.native = arguments = _Arguments(
        threads=torch.get_num_threads(),
        rows=rows.blocks.shape[0],
        blocks=rows.blocks.data_ptr(),
        blocks_stride=rows.blocks.stride(0),
        start=rows.start.data_ptr(),
        end=rows.end.data_ptr(),
        calibrated_rows=rows.calibrated.numel(),
        calibrated=rows.calibrated.data_ptr(),
        slots=rows.calibrated_slots.data_ptr(),
        theta1=rows.theta1.data_ptr(),
        theta2=rows.theta2.data_ptr(),
        gate=rows.gate.data_ptr(),
        swap_blocks=rows.swap_blocks.data_ptr(),
        swap_stride=rows.swap_blocks.stride(0),
        stored=rows.stored.data_ptr(),
        codec=None if rows.codec is None else rows.codec.data_ptr(),
        most_reads=None if rows.most_reads is None else rows.most_reads.data_ptr(),
    )
    return arguments


def _fill_layer(
    arguments: Any, layer: int, queries: Tensor, out: Tensor, cache: PackedCache, pool: SwapPool, table: StateTable
) -> None:
    kv_heads = cache.num_kv_heads
    arguments.dtype = DTYPES[queries.dtype]
    arguments.kv_heads, arguments.group = kv_heads, queries.shape[1] // kv_heads
    arguments.head_dim, arguments.block_size = cache.head_dim, cache.block_size
    arguments.query, arguments.query_stride = queries.data_ptr(), queries.stride(0)
    arguments.out, arguments.out_stride = out.data_ptr(), out.stride(0)
    arguments.out_float32 = out.dtype == torch.float32
    arguments.cache = cache.tensor.data_ptr()
    arguments.block_stride, arguments.head_stride = cache.tensor.stride(0), cache.tensor.stride(1)
    arguments.pages = pool.pages.data_ptr() + layer * pool.pages.stride(0) * pool.pages.itemsize
    arguments.pages_per_block, arguments.block_bytes = pool.pages.shape[3], pool.memory.shape[3]
    arguments.codecs = ctypes.addressof(codecs.layouts(cache.head_dim, cache.tensor.dtype))
    arguments.state_query = table.query.data_ptr() + layer * table.query.stride(0) * table.query.itemsize
    arguments.state_out = table.out.data_ptr() + layer * table.out.stride(0) * table.out.itemsize
    arguments.state_lse = table.lse.data_ptr() + layer * table.lse.stride(0) * table.lse.itemsize
    arguments.counts = table.counts.data_ptr() + layer * table.counts.stride(1) * table.counts.itemsize
    arguments.counts_stride = table.counts.stride(0)
    arguments.similarity_bounds, arguments.similarity = SIMILARITY_BOUNDS.data_ptr(), table.similarity.data_ptr()
    arguments.similarity_buckets = len(SIMILARITY_BOUNDS)


@cache
def _layouts(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """Which of the layouts that the kernels read is the cache's, by its probed offsets; None if none of them."""
    if dtype not in DTYPES or block_size % LANES or head_dim % LANES:
        return None
    offsets = block_offsets(isa, block_size, head_dim, dtype)
    token, d = torch.arange(block_size)[:, None], torch.arange(head_dim)
    values = block_size * head_dim
    if torch.equal(offsets.key, d * block_size + token) and torch.equal(offsets.value, values + token * head_dim + d):
        return KEY_TRANSPOSED, VALUE_PLAIN
    key_pairs = token // 16 * 16 * head_dim + d // 2 * 32 + token % 16 * 2 + d % 2
    value_pairs = d // 16 * 16 * block_size + token // 2 * 32 + d % 16 * 2 + token % 2
    pairs = torch.equal(offsets.key, key_pairs) and torch.equal(offsets.value, values + value_pairs)
    return (KEY_PAIRS, VALUE_PAIRS) if pairs and dtype == torch.bfloat16 else None
