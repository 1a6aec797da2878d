"""Which implementation of the operators serves this process: C++ where it can be compiled, else torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Protocol

from torch import Tensor

from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallRows, RecallStore
from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.cpp import recall as native_recall
from vllm_calidrop.ops.cpp import take as native_take
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference import decode as cpu
from vllm_calidrop.ops.reference import recall
from vllm_calidrop.worker.state_table import StateTable

logger = logging.getLogger("vllm.calidrop")

# `native`: C++ or an error; `torch`: never C++; unset or `auto`: C++ where there is a compiler.
CHOICE_VARIABLE = "VLLM_CALIDROP_CPU_OP"
CHOICES = ("auto", "native", "torch")

TakeOp = Callable[[PackedCache, Tensor, Tensor], tuple[Tensor, Tensor]]


class DecodeOp(Protocol):
    def __call__(
        self,
        rows: DecodeRows,
        layer: int,
        queries: Tensor,
        cache: PackedCache,
        pool: SwapPool,
        table: StateTable,
        scale: float,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class ColumnSumsOp(Protocol):
    def __call__(
        self, sums: Tensor, queries: Tensor, blocks: Tensor, cache: PackedCache, first_position: int, scale: float
    ) -> None: ...


class RecallOp(Protocol):
    def __call__(
        self,
        rows: RecallRows,
        layer: int,
        queries: Tensor,
        out: Tensor,
        lse: Tensor,
        pool: SwapPool,
        table: StateTable,
        store: RecallStore,
        scale: float,
    ) -> None: ...


def decode_op() -> DecodeOp:
    """The decode operator."""
    return native.decode if uses_native() else cpu.decode


def column_sums_op() -> ColumnSumsOp:
    """The operator that scores prompt tokens by the attention they received."""
    return native.add_column_sums if uses_native() else cpu.add_column_sums


def take_op() -> TakeOp:
    """The operator that reads single tokens out of the cache."""
    return native_take.take if uses_native() else PackedCache.take


def recall_op() -> RecallOp:
    """The operator that adds what recall by pages recalls."""
    return native_recall.add_recalled if uses_native() else recall.add_recalled


@cache
def uses_native() -> bool:
    """Whether the C++ operators serve this process: decided once, said in the log."""
    choice = os.environ.get(CHOICE_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{CHOICE_VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        logger.info("CaliDrop: attention over compacted prompts runs in torch (%s=torch)", CHOICE_VARIABLE)
        return False
    try:
        native.load()
    except native.build.BuildError as error:
        if choice == "native":
            raise
        logger.warning(
            "CaliDrop: attention over compacted prompts runs in torch, several times slower than compiled: %s", error
        )
        return False
    return True
