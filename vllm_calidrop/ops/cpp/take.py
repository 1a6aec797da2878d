"""Tokens out of vLLM's packed blocks in C++: the meaning is `PackedCache.take`."""

from __future__ import annotations

import ctypes
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.packed import PackedCache, block_offsets

ELEMENT_BYTES = (2, 4)


class _Arguments(ctypes.Structure):
    """take.cpp::TakeArguments, where the fields are explained."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("element_bytes", "threads", "kv_heads", "tokens", "head_dim")),
        ("block_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("key_offsets", "value_offsets", "cache")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("blocks", "index", "keys", "values")),
    ]


@once
def _operator() -> Any:
    library = native.load()
    library.calidrop_take.argtypes = [ctypes.POINTER(_Arguments)]
    library.calidrop_take_arguments_bytes.restype = ctypes.c_int64
    assert library.calidrop_take_arguments_bytes() == ctypes.sizeof(_Arguments)
    return library.calidrop_take


def take(cache: PackedCache, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [H, n, D] of one sequence's tokens at positions `index` int64 [H, n]; blocks: int32 [columns]."""
    tensor = cache.tensor
    if tensor.itemsize not in ELEMENT_BYTES:
        return cache.take(blocks, index)
    index = index.contiguous()
    assert blocks.dtype == torch.int32 and blocks.stride(0) == 1 and index.dtype == torch.int64
    assert tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3] and len(index) == cache.num_kv_heads
    offsets = block_offsets(cache.isa, cache.block_size, cache.head_dim, tensor.dtype)
    keys, values = (tensor.new_empty((*index.shape, cache.head_dim)) for _ in offsets)
    arguments = _Arguments(
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
    status = _operator()(ctypes.byref(arguments))
    assert status == 0, status
    return keys, values
