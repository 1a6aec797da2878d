"""A decode step of one layer of a model, as large as asked for, with random KV: what is timed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.cases import DecodeStep
from benchmarks.kernels.device import Call, pinned
from benchmarks.kernels.resources import ModelShape
from vllm_calidrop.evicted.codecs import layout_table
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.ops import triton as ops
from vllm_calidrop.records import COUNTERS

BLOCK_SIZE = 16
ALWAYS, NEVER = 2.0, -2.0


@dataclass(frozen=True)
class Limits:
    """Bytes of the paged cache and of the pinned pool at most. Beyond, rows share blocks: what is read stays the same,

    and is still far more than a GPU's caches hold."""

    cache: int
    pool: int


@dataclass
class Workload:
    shape: ModelShape
    query: Tensor
    out: Tensor
    cache: ops.KVCache
    host_pages: Tensor
    pages: Tensor
    rows: ops.Rows
    sequences: ops.Sequences
    state: ops.State
    scratch: ops.Scratch
    scale: float
    kept_bytes: int

    def step(self, op: DecodeStep = ops.decode_step) -> Call:
        """One decode step of the layer."""
        return partial(
            op, self.query, self.out, self.cache, self.pages, self.rows, self.sequences, self.state, self.scratch,
            self.scale,
        )  # fmt: skip

    def recompute(self, rows: int) -> None:
        """The first `rows` rows read their evicted KV in every step; the others merge what is stored."""
        self.sequences.theta1.fill_(NEVER)
        self.sequences.theta1[:rows] = ALWAYS
        self.sequences.theta2.fill_(NEVER)


def make(
    shape: ModelShape, batch: int, kept: int, evicted: int, device: torch.device, dtype: torch.dtype, limits: Limits
) -> Workload:
    """`batch` rows that attend `kept` tokens in the cache and have `evicted` tokens in the pool."""
    torch.manual_seed(0)
    kv_heads, group, head_dim = shape
    heads = kv_heads * group
    per_token = 2 * kv_heads * head_dim * dtype.itemsize
    columns = -(-kept // BLOCK_SIZE)
    blocks = min(batch * columns, max(columns, limits.cache // (BLOCK_SIZE * per_token)))
    kv = torch.empty((blocks, BLOCK_SIZE, kv_heads, 2 * head_dim), dtype=dtype, device=device).normal_()
    width = max(1, swap_blocks_for(evicted))
    swap_blocks = min(batch * width, max(width, limits.pool // (SWAP_BLOCK_TOKENS * per_token)))
    host, pages = pinned((swap_blocks, kv_heads, PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim), dtype, device)
    pages[:, 0].normal_()  # one head's worth is enough that nothing is zero everywhere
    order = torch.randperm(blocks, device=device).int()
    swap_order = torch.randperm(swap_blocks, device=device).int()

    def integers(value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    numbers = torch.arange(batch, dtype=torch.int32, device=device)
    spread = torch.arange(batch * columns, device=device) % blocks
    swap_spread = torch.arange(batch * width, device=device) % swap_blocks
    query = torch.empty((batch, heads, head_dim), dtype=dtype, device=device).normal_()
    scratch = ops.make_scratch(batch, kv_heads, group, head_dim, device)
    workload = Workload(
        shape=shape,
        query=query,
        out=torch.empty_like(query),
        cache=ops.KVCache(*kv.transpose(1, 2).split(head_dim, -1)),
        host_pages=host,
        pages=pages,
        rows=ops.Rows(numbers, numbers, integers(kept), order[spread].view(batch, columns)),
        sequences=ops.Sequences(
            integers(0), integers(evicted), *torch.zeros((2, batch), device=device), integers(0),
            swap_order[swap_spread].view(batch, width), integers(0), integers(ops.NO_BUDGET),
            layout_table(head_dim, dtype, device),
        ),
        state=ops.State(
            torch.empty((batch, kv_heads, group, head_dim), dtype=dtype, device=device).normal_(),
            torch.zeros((batch, kv_heads, group, head_dim), device=device),
            torch.zeros((batch, kv_heads, group), device=device),
            torch.zeros((batch, len(COUNTERS)), dtype=torch.int64, device=device),
        ),
        scratch=ops.view_scratch(scratch, batch, kv_heads, group, head_dim),
        scale=head_dim**-0.5,
        kept_bytes=batch * kept * per_token,
    )  # fmt: skip
    workload.recompute(0)
    return workload
