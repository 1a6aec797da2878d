"""The compiled library and its arguments: ctypes structures with the fields of contract.h, columns.cpp and take.cpp.

A structure holds addresses only: whoever fills one keeps the tensors alive.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.evicted.recall.sketch import padded_dim, signs
from vllm_calidrop.ops.base import ModelKV, Tables
from vllm_calidrop.ops.contract import Rows
from vllm_calidrop.ops.cpp import build
from vllm_calidrop.ops.packed import block_offsets
from vllm_calidrop.ops.similarity import SIMILARITY_BOUNDS

LANES = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KEY_TRANSPOSED, KEY_PAIRS = 0, 1
VALUE_PLAIN, VALUE_PAIRS = 0, 1


def _numbers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def _addresses(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Model(ctypes.Structure):
    _fields_ = _numbers("dtype", "key_layout", "value_layout", "threads", "kv_heads", "group", "head_dim", "block_size")


class _Rows(ctypes.Structure):
    _fields_ = [*_numbers("count"), *_addresses("slot", "token", "end", "table"), *_numbers("table_stride")]


class _Sequences(ctypes.Structure):
    _fields_ = [
        *_addresses("start", "stored", "theta1", "theta2", "gate", "swap_blocks"),
        *_numbers("swap_stride"),
        *_addresses("codec", "most_reads", "layouts"),
    ]


class _Recall(ctypes.Structure):
    _fields_ = [
        *_addresses("stored", "theta", "eps", "top_p", "most", "buffer_size", "rest", "sketch_blocks"),
        *_numbers("sketch_stride"),
        *_addresses("buffer_ids"),
        *_numbers("buffer_stride"),
    ]


class Shared(ctypes.Structure):
    """What is the same for all layers."""

    _fields_ = [
        ("model", _Model),
        ("sequences", _Sequences),
        ("recall", _Recall),
        *_addresses("signs"),
        *_numbers("padded_dim", "value_page_bytes"),
        *_addresses("similarity_bounds", "similarity"),
        *_numbers("similarity_buckets"),
    ]


class Layer(ctypes.Structure):
    """One layer's part of everything that stays where it is."""

    _fields_ = [
        *_addresses("pool"),
        *_numbers("block_bytes"),
        *_addresses("state_query", "state_out", "state_lse", "counts"),
        *_numbers("counts_stride"),
        *_addresses("codes", "scales", "mu", "looked", "buffer", "held", "rank"),
        *_addresses("value_codes", "value_scales", "value_mu", "balance"),
    ]


class Step(ctypes.Structure):
    """One call of `calidrop_decode`."""

    _fields_ = [
        ("rows", _Rows),
        *_addresses("query"),
        *_numbers("query_stride"),
        *_addresses("out"),
        *_numbers("out_stride"),
        *_addresses("cache"),
        *_numbers("block_stride", "head_stride"),
        ("scale", ctypes.c_double),
    ]


class ColumnArguments(ctypes.Structure):
    """One call of `calidrop_add_column_sums`; columns.cpp explains the fields."""

    _fields_ = [
        *_numbers("dtype", "key_layout", "threads", "amx"),
        *_numbers("queries", "first_position", "kv_heads", "group", "head_dim", "block_size"),
        ("scale", ctypes.c_double),
        *_addresses("query"),
        *_numbers("token_stride"),
        *_addresses("cache"),
        *_numbers("block_stride", "head_stride"),
        *_addresses("blocks", "sums"),
        *_numbers("sums_stride"),
    ]


class TakeArguments(ctypes.Structure):
    """One call of `calidrop_take`; take.cpp explains the fields."""

    _fields_ = [
        *_numbers("element_bytes", "threads", "kv_heads", "tokens", "head_dim", "block_size"),
        *_addresses("key_offsets", "value_offsets", "cache"),
        *_numbers("block_stride", "head_stride"),
        *_addresses("blocks", "index", "keys", "values"),
    ]


@cache
def load() -> ctypes.CDLL:
    """The compiled library; raises `build.BuildError` where it cannot be had."""
    try:
        return checked(ctypes.CDLL(str(build.library())))
    except OSError as error:
        raise build.BuildError(str(error)) from error


def checked(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions declared; BuildError where its structures are not those of this file."""
    sizes = {
        "calidrop_contract_bytes": sum(
            ctypes.sizeof(kind) * unit for kind, unit in ((Shared, 10**6), (Layer, 10**3), (Step, 1))
        ),
        "calidrop_column_arguments_bytes": ctypes.sizeof(ColumnArguments),
        "calidrop_take_arguments_bytes": ctypes.sizeof(TakeArguments),
    }
    for name, wanted in sizes.items():
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        if function() != wanted:
            raise build.BuildError(f"{name} of the compiled operators is {function()}, not {wanted}")
    library.calidrop_decode.argtypes = [ctypes.POINTER(Shared), ctypes.POINTER(Layer), ctypes.POINTER(Step)]
    library.calidrop_add_column_sums.argtypes = [ctypes.POINTER(ColumnArguments)]
    library.calidrop_take.argtypes = [ctypes.POINTER(TakeArguments)]
    return library


@cache
def has_matrix_unit() -> bool:
    """Whether the library was built with AMX and the system lets this process use it."""
    return bool(load().calidrop_has_amx()) and bool(torch.cpu._init_amx())


def layouts_of(model: ModelKV) -> tuple[int, int] | None:
    """Which of the layouts that the kernels read is the cache's, by its probed offsets; None if none of them."""
    block_size, head_dim = model.block_size, model.head_dim
    if model.isa is None or model.dtype not in DTYPES or block_size % LANES or head_dim % LANES:
        return None
    offsets = block_offsets(model.isa, block_size, head_dim, model.dtype)
    token, d = torch.arange(block_size)[:, None], torch.arange(head_dim)
    values = block_size * head_dim
    if torch.equal(offsets.key, d * block_size + token) and torch.equal(offsets.value, values + token * head_dim + d):
        return KEY_TRANSPOSED, VALUE_PLAIN
    key_pairs = token // 16 * 16 * head_dim + d // 2 * 32 + token % 16 * 2 + d % 2
    value_pairs = d // 16 * 16 * block_size + token // 2 * 32 + d % 16 * 2 + token % 2
    pairs = torch.equal(offsets.key, key_pairs) and torch.equal(offsets.value, values + value_pairs)
    return (KEY_PAIRS, VALUE_PAIRS) if pairs and model.dtype == torch.bfloat16 else None


def shared_arguments(tables: Tables, model: ModelKV, layouts: tuple[int, int]) -> Shared:
    """What all calls of a worker share."""
    sequences, recall, turns = tables.sequences, tables.recall, signs(padded_dim(model.head_dim))
    shared = Shared(
        model=_Model(
            dtype=DTYPES[model.dtype],
            key_layout=layouts[0],
            value_layout=layouts[1],
            threads=torch.get_num_threads(),
            kv_heads=model.num_kv_heads,
            group=model.group,
            head_dim=model.head_dim,
            block_size=model.block_size,
        ),
        signs=turns.data_ptr(),
        padded_dim=len(turns),
        value_page_bytes=tables.store.value_codes.shape[-1],
        similarity_bounds=SIMILARITY_BOUNDS.data_ptr(),
        similarity=tables.similarity.data_ptr(),
        similarity_buckets=len(SIMILARITY_BOUNDS),
    )
    _point(shared.sequences, sequences._asdict())
    shared.sequences.swap_stride = sequences.swap_blocks.stride(0)
    _point(shared.recall, recall._asdict())
    shared.recall.sketch_stride = recall.sketch_blocks.stride(0)
    shared.recall.buffer_stride = recall.buffer_ids.stride(0)
    return shared


def layer_arguments(tables: Tables, layer: int) -> Layer:
    """What all calls of one layer share."""
    state, memory = tables.states[layer], tables.pool.memory
    arguments = Layer(pool=memory[layer].data_ptr(), block_bytes=memory.shape[3], counts_stride=state.counts.stride(0))
    _point(arguments, {"state_query": state.query, "state_out": state.out, "state_lse": state.lse})
    arguments.counts = state.counts.data_ptr()
    _point(arguments, {name: getattr(tables.store, name)[layer] for name in _STORED})
    return arguments


_STORED = (
    *("codes", "scales", "mu", "looked", "buffer", "held", "rank"),
    *("value_codes", "value_scales", "value_mu", "balance"),
)


def row_arguments(rows: Rows) -> _Rows:
    """A step's rows; their tensors must live as long as the call."""
    arguments = _Rows(count=len(rows.slot), table_stride=rows.block_table.stride(0), table=rows.block_table.data_ptr())
    _point(arguments, {"slot": rows.slot, "token": rows.token, "end": rows.end})
    return arguments


def _point(arguments: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
