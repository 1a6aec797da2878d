"""The contract of an operator set: everything that is done to a layer's KV beside vLLM's own attention.

A set serves one worker. It is given the worker's tables once and is then called per layer; how it works (torch, C++,
Triton, xFormers) is its own affair, what it means is said here and in `algorithm/calibration.py`. What a set does not
support it declares (`refusal`, `VALUES`), and that is refused at start-up or as a 400 with the setting's name: a set
never hands single calls on to another one without saying so. `ops/registry.py` says how one is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import attention_state
from vllm_calidrop.evicted.codecs import Codec
from vllm_calidrop.evicted.pool import BLOCKS_AT_ONCE, SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.contract import Recall, Rows, Sequences, State
from vllm_calidrop.ops.state import store_state


class Tables(NamedTuple):
    """What a worker's operators read and write beside the KV cache, for its whole life.

    sequences, recall: by state slot. states: one per layer. similarity: the histogram of ops/similarity.py. pool: the
    evicted KV. store: sketches and page buffers of recall by pages.
    """

    sequences: Sequences
    recall: Recall
    states: tuple[State, ...]
    similarity: Tensor
    pool: SwapPool
    store: RecallStore


class ModelKV(NamedTuple):
    """One rank's share of the model, as a set must know it. isa: vLLM's CPU kernel family, None on other platforms."""

    dtype: torch.dtype
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    isa: str | None


class OperatorSet(ABC):
    """One implementation of the operators.

    Shapes as in `ops/contract.py`; `blocks` is one sequence's block table, int32 [columns], stride(0) == 1, and `cache`
    is what `cache_of` returned for the layer. Positions and indices are int64 and ascending within a KV head.

    VALUES: for settings of which this set serves some values only, those values; a setting not named is served whole.
    decodes_first: whether it serves codecs without a kernel layout (`Codec.kernel_layout`).
    in_graphs: whether `decode` may be captured in a full CUDA graph.
    """

    name: ClassVar[str]
    VALUES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    decodes_first: ClassVar[bool] = True
    in_graphs: ClassVar[bool] = False

    def __init__(self, tables: Tables, model: ModelKV, max_rows: int) -> None:
        self.tables = tables
        self.model = model

    @classmethod
    def refusal(cls, model: ModelKV) -> str | None:
        """Why this set cannot serve a model here, None if it can."""
        return None

    @classmethod
    def scratch_bytes(cls, model: ModelKV, max_rows: int) -> int:
        """Device memory that the set holds for batches of up to `max_rows` rows."""
        return 0

    @abstractmethod
    def cache_of(self, kv_cache: Tensor) -> Any:
        """A layer's KV cache [blocks, H, bs, 2 * D], as vLLM binds it, in the form that the other methods take."""

    @abstractmethod
    def observe(
        self, sums: Tensor, queries: Tensor, cache: Any, blocks: Tensor, first_position: int, scale: float
    ) -> None:
        """Add to `sums` float32 [H, P] the causal softmax attention that every prompt token receives from the queries
        [q, Hq, D] at positions first_position, first_position + 1, ..., mean over each group's heads
        (policies/h2o.py)."""

    @abstractmethod
    def take(self, cache: Any, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [H, n, D] of one sequence's tokens at positions `index` [H, n]: every KV head has its own."""

    @abstractmethod
    def put(self, cache: Any, blocks: Tensor, first_position: int, keys: Tensor, values: Tensor) -> None:
        """Store K and V [H, n, D] as the tokens first_position, first_position + 1, ... of one sequence."""

    @abstractmethod
    def decode(self, query: Tensor, out: Tensor, cache: Any, layer: int, rows: Rows, scale: float) -> None:
        """One decode step of one layer (Algorithm 2): attention of every row's query over its kept tokens and, by the
        gate or by recall, over its evicted ones, into `out`; state table and counters are renewed.

        query, out: [tokens, Hq, D], stride(2) == 1; only the rows' tokens are read and written.
        """

    def pack(self, cache: Any, blocks: Tensor, positions: Tensor, codec: Codec, out: Tensor) -> Tensor:
        """Encode tokens `positions` [H, m] into swap blocks `out`, uint8 [blocks, H, block_bytes].

        Returns bool [H]: the KV heads whose KV the codec refuses (`Encoded.refused`).
        """
        refused = []
        # Some blocks at a time, so that copies stay small: `out` may be all of a staging buffer.
        tokens = BLOCKS_AT_ONCE * codec.tokens_per_block
        for some, part in zip(positions.split(tokens, 1), out.split(BLOCKS_AT_ONCE), strict=True):
            encoded = codec.encode(*self.take(cache, blocks, some))
            if encoded.blocks.transpose(0, 1).shape != part.shape:
                raise ValueError(f"the codec {codec.name} gave {tuple(encoded.blocks.shape)} for {tuple(some.shape)}")
            part.copy_(encoded.blocks.transpose(0, 1))
            refused.append(encoded.refused)
        return torch.stack(refused).any(0)

    def calibrate(
        self, query: Tensor, cache: Any, blocks: Tensor, evicted: Tensor, layer: int, slot: int, scale: float
    ) -> None:
        """Store in slot `slot` the attention state of `query` [Hq, D] over tokens `evicted` [H, m] (m may be 0)."""
        grouped = query.view(self.model.num_kv_heads, -1, self.model.head_dim)
        state = attention_state(grouped, *self.take(cache, blocks, evicted), scale)
        store_state(self.tables.states[layer], slot, grouped, state)
