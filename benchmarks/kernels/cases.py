"""A batch of rows with everything around the attended tokens NaN, in any layout, and what it must come to.

Cases are made on the CPU from a seed, so they are the same everywhere, and then moved. The tests under Triton's
interpreter use them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Gate, attention_state, cosine, decide, merge_states
from vllm_calidrop.evicted.codecs import codec_of, layout_table, number_of
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.contract import NO_BUDGET, KVCache, Rows, Sequences, State
from vllm_calidrop.ops.state import count_decision, store_state
from vllm_calidrop.ops.triton import Scratch, decode_step
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.worker.state_table import StateTable

Attend = Callable[[Tensor, Tensor, Tensor, float], AttentionState]
# A decode step with the arguments of `ops/triton/operators.py::decode_step`.
DecodeStep = Callable[..., None]
LAYERS, LAYER = 2, 1
STRANGE = 999_999  # a block that does not exist: reading it is an error, or garbage


def layouts(blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layout: str) -> KVCache:
    """vLLM's caches as views of [blocks, H, bs, D], full of NaN."""
    if layout == "cuda-tokens":  # token-major, K and V interleaved in the last dimension
        cache = torch.full((blocks, block_size, kv_heads, 2 * head_dim), torch.nan, dtype=dtype).transpose(1, 2)
        return KVCache(*cache.split(head_dim, -1))
    cache = torch.full((blocks, kv_heads, block_size, 2 * head_dim), torch.nan, dtype=dtype)
    if layout == "cuda-heads":
        return KVCache(*cache.split(head_dim, -1))
    assert layout == "cpu-vec"  # K transposed, then V
    key, value = cache.view(blocks, kv_heads, 2, block_size * head_dim).unbind(2)
    return KVCache(
        key.unflatten(-1, (head_dim, block_size)).transpose(2, 3), value.unflatten(-1, (block_size, head_dim))
    )


class Shape(NamedTuple):
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "cuda-tokens"


class Row(NamedTuple):
    """end = 0: padding. plain: a row of plain vLLM. near: how alike old and new queries are. most_reads: None: all."""

    end: int
    start: int = 0
    stored: int = 0
    plain: bool = False
    theta1: float = 0.7
    theta2: float = 0.85
    gate: int = 0
    near: float = 1.0
    codec: str = "none"
    most_reads: int | None = None


# Around the edges of blocks (16), tiles (64, 32), swap pages (16) and swap blocks (128).
ROWS = [
    Row(1),
    Row(17, start=15, stored=1),
    Row(0),
    Row(64, start=0, stored=16, gate=Gate.HEAD),
    Row(130, start=1, stored=129, gate=Gate.GROUP_MEAN),
    Row(33, plain=True),
    Row(66, start=33, stored=0),
    Row(98, start=33, stored=100, gate=Gate.HEAD),
]


@dataclass
class Case:
    shape: Shape
    query: Tensor
    cache: KVCache
    pool: SwapPool
    rows: Rows
    sequences: Sequences
    table: StateTable
    kept: list[tuple[Tensor, Tensor] | None]
    scale: float

    def to(self, device: torch.device) -> Case:
        """The same on a device; `expected` is asked of the original."""
        pages = SwapPool.__new__(SwapPool)
        pages.pages = self.pool.pages.to(device)
        moved = {name: moved_to(getattr(self, name), device) for name in ("query", "cache", "rows", "sequences")}
        return replace(self, pool=pages, table=copy_of(self.table, device), **moved)

    def finite(self) -> Case:
        """Numbers instead of NaN: xFormers reads whole pages before it masks, and a real cache holds numbers."""
        for tensor in (*self.cache, self.pool.pages):
            tensor.nan_to_num_(nan=3.0)
        return self

    def state(self, table: StateTable) -> State:
        return table.layers[LAYER]


def make(shape: Shape, given: list[Row], seed: int = 0) -> Case:
    torch.manual_seed(seed)
    kv_heads, group, head_dim, bs, dtype, layout = shape
    num_rows, num_slots = len(given), len(given) + 2
    columns = max(1, -(-max(row.end for row in given) // bs)) + 1
    cache = layouts(num_rows * columns + 1, kv_heads, bs, head_dim, dtype, layout)
    free = iter((torch.randperm(num_rows * columns) + 1).tolist())
    table = torch.full((num_rows, columns + 3), STRANGE, dtype=torch.int32)
    slots = torch.randperm(num_slots)[:num_rows].int()
    tokens = torch.randperm(num_rows + 1)[:num_rows].int()
    widths = [codec_of(row.codec, head_dim, dtype).blocks_for(row.stored) for row in given]
    swap = torch.full((num_slots, max(1, *widths) + 1), STRANGE, dtype=torch.int32)
    swap_free = iter(torch.randperm(sum(widths) + 1).tolist())
    pool = SwapPool(LAYERS, sum(widths) + 1, kv_heads, head_dim, dtype)
    pool.pages.fill_(torch.nan)
    states = StateTable(LAYERS, num_slots, kv_heads, group, head_dim, dtype)
    start, stored, gate, codec, most = (torch.full((num_slots,), -7, dtype=torch.int32) for _ in range(5))
    theta1, theta2 = torch.full((2, num_slots), torch.nan)
    query = torch.randn((num_rows + 1, kv_heads * group, head_dim)).to(dtype)
    scale, kept = head_dim**-0.5, []
    for index, row in enumerate(given):
        slot, token = int(slots[index]), int(tokens[index])
        if row.end == 0:
            tokens[index] = STRANGE
            kept.append(None)
            start[slot] = 0
            continue
        first = 0 if row.plain else row.start
        for column in range(first // bs, -(-row.end // bs)):
            table[index, column] = next(free)
        position = torch.arange(first, row.end)
        keys, values = torch.randn((2, kv_heads, len(position), head_dim)).to(dtype)
        blocks = table[index, position // bs].long()
        cache.key[blocks, :, position % bs] = keys.transpose(0, 1)
        cache.value[blocks, :, position % bs] = values.transpose(0, 1)
        kept.append((keys, values))
        if row.plain:
            slots[index] = -1
            continue
        start[slot], stored[slot], gate[slot] = row.start, row.stored, row.gate
        theta1[slot], theta2[slot] = row.theta1, row.theta2
        codec[slot] = number_of(row.codec)
        most[slot] = NO_BUDGET if row.most_reads is None else row.most_reads
        if row.stored:
            ids = tuple(next(swap_free) for _ in range(widths[index]))
            swap[slot, : len(ids)] = torch.tensor(ids)
            keys, values = torch.randn((2, kv_heads, row.stored, head_dim)).to(dtype)
            pool.write(LAYER, ids, keys, values, row.codec)
            new = query[token].view(kv_heads, group, head_dim).float()
            old = (new + torch.randn_like(new) * torch.rand((kv_heads, group, 1)) * row.near).to(dtype)
            store_state(states.layers[LAYER], slot, old, attention_state(old, keys, values, scale))
    rows = Rows(slots, tokens, torch.tensor([row.end for row in given], dtype=torch.int32), table)
    sequences = Sequences(start, stored, theta1, theta2, gate, swap, codec, most, layout_table(head_dim, dtype))
    return Case(shape, query, cache, pool, rows, sequences, states, kept, scale)


def moved_to(value: Any, device: torch.device) -> Any:
    """A tensor, or a named tuple of tensors, on a device, with its strides."""
    if not isinstance(value, Tensor):
        return type(value)(*(moved_to(part, device) for part in value))
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def copy_of(table: StateTable, device: torch.device | str = "cpu") -> StateTable:
    copy = StateTable(*table.query.shape, table.query.dtype, torch.device(device))
    for name in ("query", "out", "lse", "counts"):
        getattr(copy, name).copy_(getattr(table, name))
    return copy


def attend_in_float64(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> AttentionState:
    logits = query.double() @ keys.double().transpose(-1, -2) * scale
    return AttentionState(logits.softmax(-1) @ values.double(), logits.logsumexp(-1))


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    table: StateTable


def dirty_scratch(
    rows: int, heads: int, kv_heads: int, head_dim: int, splits: int, device: torch.device | str = "cpu"
) -> Scratch:
    states = [torch.full((rows, heads, splits, *rest), torch.nan, device=device) for rest in ((head_dim,), ()) * 2]
    decision = torch.full((rows, heads), 77, dtype=torch.int32, device=device)
    return Scratch(*states, decision, torch.full((rows, kv_heads), torch.nan, device=device))


def run(case: Case, splits: int = 2, step: DecodeStep = decode_step) -> Result:
    """Through the kernels, on the case's device; scratch and answer are dirty before."""
    kv_heads, group, head_dim = case.shape[:3]
    num_rows, device = len(case.rows.slot), case.query.device
    scratch = dirty_scratch(num_rows, kv_heads * group, kv_heads, head_dim, splits, device)
    table = copy_of(case.table, device)
    out = torch.full_like(case.query, torch.inf, dtype=torch.float32)
    lse = torch.full((num_rows, kv_heads * group), torch.inf, device=device)
    step(
        case.query, out, case.cache, case.pool.pages[LAYER], case.rows, case.sequences, case.state(table), scratch,
        case.scale, lse,
    )  # fmt: skip
    return Result(out.cpu(), lse.cpu(), copy_of(table))


def expected(case: Case, attend: Attend = attention_state) -> Result:
    """The same in torch, row by row, from `calibration.py`; `attend` may compute in another precision."""
    kv_heads, group, head_dim = case.shape[:3]
    table = copy_of(case.table)
    out = torch.full_like(case.query, torch.inf, dtype=torch.float32)
    lse = torch.full((len(case.rows.slot), kv_heads * group), torch.inf)
    for index, kept in enumerate(case.kept):
        if kept is None:
            continue
        slot, token = int(case.rows.slot[index]), int(case.rows.token[index])
        query = case.query[token].view(kv_heads, group, head_dim)
        state = attend(query, *kept, case.scale)
        stored = int(case.sequences.stored[slot]) if slot >= 0 else 0
        if stored:
            state = _calibrated(case, table, slot, stored, query, state, attend)
        out[token], lse[index] = state.out.flatten(0, 1).float(), state.lse.flatten().float()
    return Result(out, lse, table)


def _calibrated(
    case: Case, table: StateTable, slot: int, stored: int, query: Tensor, kept: AttentionState, attend: Attend
) -> AttentionState:
    sequences, slots = case.sequences, torch.tensor([slot])
    rho = cosine(query, table.query[LAYER, slot])[None]
    thetas = (sequences.theta1[slots], sequences.theta2[slots])
    decision = decide(rho, *thetas, sequences.gate[slots], sequences.most_reads[slots])
    count_decision(table.layers[LAYER], slots, decision)
    recompute, merge = decision.recompute[0], decision.merge[0]
    codec = int(sequences.codec[slot])
    ids = sequences.swap_blocks[slot, : case.pool.codecs[codec].blocks_for(stored)].long()
    heads = torch.arange(case.shape.kv_heads)
    keys, values = case.pool.read(LAYER, ids.expand(len(heads), -1), heads, codec)
    fresh = attend(query, keys[:, :stored], values[:, :stored], case.scale)
    table.query[LAYER, slot][recompute] = query[recompute]
    table.out[LAYER, slot][recompute] = fresh.out[recompute].float()
    table.lse[LAYER, slot][recompute] = fresh.lse[recompute].float()
    used = table.lse[LAYER, slot].masked_fill(~(recompute | merge), -torch.inf)
    return merge_states(kept, AttentionState(table.out[LAYER, slot], used))


def assert_same(
    case: Case, found: Result, atol: float = 2e-6, rtol: float = 2e-5, attend: Attend = attention_state
) -> Result:
    """found: of the case wherever it was run; case: the original."""
    wanted = expected(case, attend)
    torch.testing.assert_close(found.out, wanted.out, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.lse, wanted.lse, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.table.out, wanted.table.out, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.table.lse, wanted.table.lse, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.table.query, wanted.table.query, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(found.table.counts, wanted.table.counts), (found.table.counts, wanted.table.counts)
    assert found.table.counts.shape[-1] == len(COUNTERS)
    return wanted
