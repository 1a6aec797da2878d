"""One layer's tables, pool and cache with made-up sequences: what tests and benchmarks call operator sets with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.base import ModelKV, OperatorSet, Tables
from vllm_calidrop.ops.contract import Rows
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.similarity import similarity_histogram
from vllm_calidrop.records import RecallRecord, SequenceRecord
from vllm_calidrop.worker.slots import SlotTables
from vllm_calidrop.worker.state_table import StateTable


def isa_of(dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """The kernel family that vLLM takes on this machine, ready to be called outside of vLLM."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = str(_get_attn_isa(dtype, block_size, head_dim))
    if isa == "amx":
        torch.cpu._init_amx()
    return isa


def sequence(
    slot: int, start: int, stored: int = 0, swap_blocks: tuple[int, ...] = (), codec: str = "none",
    thetas: tuple[float, float] = (0.7, 0.85), gate: int = 0, most_reads: int | None = None,
    recall: RecallRecord | None = None,
) -> SequenceRecord:  # fmt: skip
    """A sequence in state slot `slot` whose attended tokens begin at `start`; the policy's fields are made up."""
    budget = 64
    return SequenceRecord(
        request_id=str(slot), admission=slot, slot=slot, prompt_len=start + budget, compaction_point=start + budget,
        budget=budget, first_block=0, view_start=0, policy="snapkv", window=32, sinks=0, pool_kernel=5,
        theta1=thetas[0], theta2=thetas[1], gate=gate, stored=stored, swap_blocks=swap_blocks, recall=recall,
        codec=codec, most_reads=most_reads,
    )  # fmt: skip


class Layers:
    """The tables of some layers for made-up sequences; whatever was not written is NaN, or the largest code."""

    def __init__(
        self, model: ModelKV, num_slots: int, swap_blocks: int, layers: int = 1, sketch_blocks: int = 0,
        buffer_pages: int = 0, max_model_len: int = 16384, rest: str = "none",
    ) -> None:  # fmt: skip
        heads = (model.num_kv_heads, model.head_dim, model.dtype)
        self.model = model
        self.pool = SwapPool(layers, swap_blocks, *heads)
        self.pool.pages.fill_(torch.nan)
        self.store = RecallStore(layers, num_slots, sketch_blocks, buffer_pages, *heads, rest)
        self.store.codes.fill_(255)
        self.store.scales.fill_(torch.nan)
        self.store.value_codes.fill_(255)
        self.store.value_scales.fill_(torch.nan)
        self.store.buffer.fill_(torch.nan)
        self.table = StateTable(layers, num_slots, model.num_kv_heads, model.group, model.head_dim, model.dtype)
        self.slots = SlotTables(num_slots, max_model_len, model.head_dim, model.dtype, torch.device("cpu"))
        self.similarity = similarity_histogram()

    def admit(self, record: SequenceRecord) -> None:
        """As a worker does it."""
        self.table.admit(record.slot)
        self.store.admit(record)
        self.slots.admit([record])

    @property
    def tables(self) -> Tables:
        """As an operator set takes them."""
        return Tables(
            self.slots.sequences, self.slots.recall, self.table.layers, self.similarity, self.pool, self.store
        )

    def served_by(self, operators: type[OperatorSet], max_rows: int = 64) -> OperatorSet:
        return operators(self.tables, self.model, max_rows)

    def copy(self) -> Layers:
        """The same state apart from this one's; the pool is shared."""
        other = copy.copy(self)
        shape = self.table.query.shape
        other.table = StateTable(*shape, self.model.dtype)
        for name in ("query", "out", "lse", "counts"):
            getattr(other.table, name).copy_(getattr(self.table, name))
        other.store, other.similarity = copy.deepcopy(self.store), self.similarity.clone()
        return other


def rows_of(slots: Tensor, end: Tensor, block_table: Tensor, token: Tensor | None = None) -> Rows:
    """Rows of a step in the dtype of the contract; token: by default the rows' own numbers."""
    token = torch.arange(len(slots)) if token is None else token
    return Rows(slots.int(), token.int(), end.int(), block_table.int())


def filled_cache(model: ModelKV, rows: int, columns: int, spans: list[tuple[int, int]]) -> tuple[PackedCache, Tensor]:
    """A cache with random tokens of each row at positions `spans` [start, end), NaN elsewhere, and its block table."""
    assert model.isa is not None
    block_table = (torch.randperm(rows * columns) + 1).view(rows, columns).int()
    shape = (rows * columns + 1, model.num_kv_heads, model.block_size, 2 * model.head_dim)
    cache = PackedCache(torch.full(shape, torch.nan, dtype=model.dtype), model.isa)
    for row, (start, end) in enumerate(spans):
        keys, values = torch.randn((2, model.num_kv_heads, end - start, model.head_dim)).to(model.dtype)
        cache.put(block_table[row], start, keys, values)
    return cache, block_table
