"""The decode step in xFormers: partial attention over the paged cache and over the swap pool, then `merge_attentions`.

It is the yardstick of the Triton kernels, and another implementation where those are not wanted, behind the same
contract (`ops/contract.py`); compaction is the Triton set's. Nothing waits for the device here either: lengths and
tables are device tensors, and where the gate does not ask for evicted KV its length is zero. But intermediate tensors
are allocated in every step, and the state table is renewed by passes over all its slots. xFormers' own limits are fp16
and bf16, a head_dim that is a power of two, and that whole pages are read before they are masked: what lies in a row's
first block before its start must be finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha import triton_splitk
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalGappyKeysMask, _GappySeqInfo, _SeqLenInfo

from vllm_calidrop.algorithm.calibration import AttentionState, cosine, decide
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.ops.contract import KVCache, Rows, Sequences, State
from vllm_calidrop.ops.triton.operators import TritonSet
from vllm_calidrop.ops.triton.scratch import Scratch


class XformersSet(TritonSet):
    """`VLLM_CALIDROP_OPS=xformers`. It allocates in every step, so it is never captured in a full CUDA graph."""

    name = "xformers"
    VALUES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **TritonSet.VALUES,
        "kv_codec": ("none",),
        "kv_read_budget": (None,),
    }
    in_graphs = False

    @classmethod
    def refusal(cls, model: ModelKV) -> str | None:
        if model.dtype not in (torch.float16, torch.bfloat16):
            return f"xFormers attends in float16 and bfloat16, not in {model.dtype}"
        if model.head_dim & (model.head_dim - 1):
            return f"xFormers needs a head_dim that is a power of two, not {model.head_dim}"
        return super().refusal(model)

    def cache_of(self, kv_cache: Tensor) -> KVCache:
        cache = super().cache_of(kv_cache)
        if not can_read(cache):
            raise ValueError(
                f"xFormers cannot read a cache [blocks, KV heads, tokens, head_dim] with strides {cache.key.stride()}"
            )
        return cache

    def decode(self, query: Tensor, out: Tensor, cache: KVCache, layer: int, rows: Rows, scale: float) -> None:
        tables = self.tables
        state, scratch = tables.states[layer], self.scratch(len(rows.slot))
        decode_step(query, out, cache, self.pages(layer), rows, tables.sequences, state, scratch, scale)


def can_read(cache: KVCache) -> bool:
    """Whether tokens lie so that xFormers can be told where: equally far apart, tokens or heads outside."""
    return _token_major(cache) is not None or _head_major(cache) is not None


def decode_step(
    query: Tensor, out: Tensor, cache: KVCache, pages: Tensor, rows: Rows, sequences: Sequences, state: State,
    scratch: Scratch, scale: float, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Means what `ops/triton/operators.py::decode_step` means; it uses only the scratch's numbers of splits."""
    kv_heads, group = state.query.shape[1:3]
    slot = rows.slot.long()
    compacted = slot >= 0
    slot = slot.clamp_min(0)
    start = torch.where(compacted, sequences.start[slot], 0)
    real = rows.end > start
    # Padding may name any token and any slot: it attends nothing, as token 0, and is left out below.
    token = torch.where(real, rows.token, 0).long()
    end = torch.where(real, rows.end, start)
    mine = query[token].unflatten(1, (kv_heads, group))
    kept = _attend_cache(mine, cache, rows.block_table, start, end, scale, scratch.kept_lse.shape[2])

    stored = torch.where(real & compacted, sequences.stored[slot], 0)
    decision = decide(
        cosine(mine, state.query[slot]), sequences.theta1[slot], sequences.theta2[slot], sequences.gate[slot]
    )
    calibrated = (stored > 0)[:, None, None]
    recompute, merge = decision.recompute & calibrated, decision.merge & calibrated
    reads = recompute.any(-1)
    wanted = torch.where(reads, stored[:, None], 0)
    fresh = _attend_pages(mine, pages, sequences.swap_blocks[slot], wanted, scale, scratch.evicted_lse.shape[2])

    evicted_out = torch.where(recompute[..., None], fresh.out, state.out[slot])
    evicted_lse = torch.where(recompute, fresh.lse, state.lse[slot].masked_fill(~merge, -torch.inf))
    merged = _merge(kept, AttentionState(evicted_out, evicted_lse))

    row = torch.arange(len(slot), device=slot.device)
    _renew(state, slot, row, real & compacted, recompute, mine, fresh)
    _count(state.counts, slot, calibrated.flatten(), recompute, merge, reads)
    of_token = _row_of(len(out), token, row, real)
    written = merged.out.flatten(1, 2)[of_token.clamp_min(0)].to(out.dtype)
    out.copy_(torch.where((of_token >= 0)[:, None, None], written, out))
    if lse is not None:
        lse.copy_(torch.where(real[:, None], merged.lse.flatten(1), lse))


def _attend_cache(
    query: Tensor, cache: KVCache, table: Tensor, start: Tensor, end: Tensor, scale: float, splits: int
) -> AttentionState:
    """State of query [N, H, G, D] over tokens [start, end) of every row; table: [N, C]."""
    num_rows, kv_heads, group, head_dim = query.shape
    block_size = cache.key.shape[2]
    views = _token_major(cache)
    if views is not None:
        return _partial(query, views, table, start, end, block_size, scale, splits)
    views = _head_major(cache)
    assert views is not None, cache.key.stride()
    # A block of one KV head is a page, and (row, KV head) a sequence with one KV head.
    heads = torch.arange(kv_heads, device=query.device)
    table = (table[:, None, :].long() * kv_heads + heads[:, None]).flatten(0, 1)
    start, end = start.repeat_interleave(kv_heads), end.repeat_interleave(kv_heads)
    state = _partial(query.view(-1, 1, group, head_dim), views, table, start, end, block_size, scale, splits)
    return AttentionState(state.out.view(query.shape), state.lse.view(num_rows, kv_heads, group))


def _attend_pages(
    query: Tensor, pages: Tensor, swap_blocks: Tensor, wanted: Tensor, scale: float, splits: int
) -> AttentionState:
    """State of query [N, H, G, D] over the first `wanted` [N, H] evicted tokens of each (row, KV head)."""
    num_rows, kv_heads, group, head_dim = query.shape
    assert pages.is_contiguous()
    # K and V of a page alternate, 16 tokens each: V is the same run of pages, one page further on.
    flat = pages.view(1, -1, 1, 1, head_dim)
    views = KVCache(flat[:, :-PAGE_TOKENS], flat[:, PAGE_TOKENS:])
    heads = torch.arange(kv_heads, device=query.device)
    run = swap_blocks[:, None, :].long() * kv_heads + heads[:, None]
    table = 2 * (run[..., None] * PAGES_PER_BLOCK + torch.arange(PAGES_PER_BLOCK, device=query.device))
    nothing = torch.zeros_like(wanted.flatten())
    state = _partial(
        query.view(-1, 1, group, head_dim), views, table.view(num_rows * kv_heads, -1), nothing, wanted.flatten(),
        PAGE_TOKENS, scale, splits,
    )  # fmt: skip
    return AttentionState(state.out.view(query.shape), state.lse.view(num_rows, kv_heads, group))


def _partial(
    query: Tensor, kv: KVCache, table: Tensor, start: Tensor, end: Tensor, page: int, scale: float, splits: int
) -> AttentionState:
    """State of query [M, H, G, D] over tokens [start, end) of pages `table` [M, C]; kv: [1, tokens, H, 1, D]."""
    sequences, kv_heads, group, _ = query.shape
    most = table.shape[1] * page
    start = torch.nn.functional.pad(start.int(), (0, 1))
    # The lists are what xFormers looks at on the host: upper bounds, as the lengths are on the device.
    lengths = _GappySeqInfo(
        seqstart=start, max_seqlen=most, min_seqlen=0, seqstart_py=[0] * (sequences + 1), seqlen=end.int(),
        seqlen_py=[most] * sequences,
    )  # fmt: skip
    queries = _one_query_each(sequences, query.device)
    mask = PagedBlockDiagonalGappyKeysMask(
        q_seqinfo=queries, k_seqinfo=lengths, block_tables=table.int(), page_size=page
    )
    operator: Any = triton_splitk.FwOp.get_operator(splits, block_n=next(n for n in (64, 32, 16) if page % n == 0))
    out, lse = fmha.memory_efficient_attention_partial(
        query[None], *(view.expand(-1, -1, -1, group, -1) for view in kv), mask, scale=scale, op=operator,
        output_dtype=torch.float32,
    )  # fmt: skip
    return AttentionState(out.view(query.shape), lse.view(kv_heads, group, sequences).permute(2, 0, 1).float())


@cache
def _one_query_each(sequences: int, device: torch.device) -> Any:
    """Kept, because making it copies from the host."""
    return _SeqLenInfo.from_seqlens([1] * sequences, device=device)


def _merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Merges states [N, H, G, D]. xFormers' function takes them as [2, 1, N, H, G, D], log-sum-exps [2, 1, H, G, N]."""
    outs, lses = torch.stack((a.out, b.out)), torch.stack((a.lse, b.lse))
    out, lse = fmha.merge_attentions(outs[:, None], lses.permute(0, 2, 3, 1)[:, None])
    assert lse is not None
    return AttentionState(out[0], lse[0].permute(2, 0, 1))


def _token_major(cache: KVCache) -> KVCache | None:
    """[1, tokens, H, 1, D] views where the tokens of all blocks are equally far apart, else None."""
    blocks, kv_heads, block_size, head_dim = cache.key.shape
    if any(view.stride(0) != block_size * view.stride(2) or view.stride(3) != 1 for view in cache):
        return None
    return KVCache(*(
        view.as_strided((1, blocks * block_size, kv_heads, 1, head_dim), (0, view.stride(2), view.stride(1), 0, 1))
        for view in cache
    ))  # fmt: skip


def _head_major(cache: KVCache) -> KVCache | None:
    """[1, blocks * H * bs, 1, 1, D] views where the tokens of all heads of all blocks are, else None."""
    blocks, kv_heads, block_size, head_dim = cache.key.shape
    for view in cache:
        run = block_size * view.stride(2)
        if view.stride(1) != run or view.stride(0) != kv_heads * run or view.stride(3) != 1:
            return None
    tokens = blocks * kv_heads * block_size
    return KVCache(*(view.as_strided((1, tokens, 1, 1, head_dim), (0, view.stride(2), 0, 0, 1)) for view in cache))


def _row_of(size: int, index: Tensor, row: Tensor, real: Tensor) -> Tensor:
    """int64 [size]: the row whose `index` is here, -1 for none; of rows that are not real nothing is taken."""
    found = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    return found.scatter_(0, torch.where(real, index, size), row)[:size]


def _renew(
    state: State, slot: Tensor, row: Tensor, real: Tensor, recompute: Tensor, query: Tensor, fresh: AttentionState
) -> None:
    """The heads that recomputed put their query and state into the table, by a pass over all slots."""
    of_slot = _row_of(len(state.query), slot, row, real)
    source = of_slot.clamp_min(0)
    renewed = (of_slot >= 0)[:, None, None] & recompute[source]
    for table, values in ((state.query, query), (state.out, fresh.out), (state.lse, fresh.lse)):
        where = renewed if table.dim() == 3 else renewed[..., None]
        table.copy_(torch.where(where, values[source].to(table.dtype), table))


def _count(counts: Tensor, slot: Tensor, calibrated: Tensor, recompute: Tensor, merge: Tensor, reads: Tensor) -> None:
    heads = recompute.shape[1] * recompute.shape[2]
    recomputes, merges = recompute.sum((1, 2)), merge.sum((1, 2))
    columns = torch.stack((recomputes, merges, heads - recomputes - merges, reads.sum(-1)), dim=-1)
    counts[:, :4].index_add_(0, slot, columns * calibrated[:, None])
