"""The decode operators at equal kept length: vLLM's own, ours in C++ and in torch; the reload against memory speed;
the look of recall by pages."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops

from benchmarks.throughput.timing import interleaved, load, ratio
from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.codecs import codec_of, number_of
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallRows, RecallStore
from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.choice import RecallOp
from vllm_calidrop.ops.cpp import recall as native_recall
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference import decode as cpu
from vllm_calidrop.ops.reference import recall
from vllm_calidrop.worker.state_table import StateTable


@dataclass(frozen=True)
class OpCase:
    """One layer of one decode step. stored: evicted tokens per KV head on the host (0: eviction only), as codec has
    them."""

    rows: int = 16
    query_heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    kept: int = 256
    stored: int = 0
    theta1: float = 0.7
    dtype: str = "bfloat16"
    block_size: int = 32
    codec: str = "none"


CASES = [
    OpCase(query_heads=8, kv_heads=2, head_dim=64),
    OpCase(query_heads=8, kv_heads=2, head_dim=128),
    OpCase(),
    OpCase(kept=128),
    OpCase(kept=1024),
    OpCase(head_dim=128),
    OpCase(dtype="float32"),
    OpCase(dtype="float32", head_dim=128),
    OpCase(block_size=128),
]
LOOKS = [
    OpCase(stored=stored, kept=128, head_dim=head_dim, query_heads=query_heads)
    for stored, head_dim, query_heads in ((1024, 64, 16), (4096, 64, 16), (4096, 128, 16), (4096, 64, 4))
]
RELOADS = [OpCase(stored=stored, theta1=2.0, kept=128) for stored in (1024, 4096, 8192)] + [
    OpCase(stored=4096, theta1=2.0, kept=128, head_dim=128, dtype=dtype, codec=codec)
    for dtype in ("bfloat16", "float32")
    for codec in ("none", "fp8", "int8", "int4", "int2")
]


LAYERS = 8  # a step goes through that many caches, so that no layer finds its own still in the CPU's


class Layer:
    """Everything one call of an operator needs, for a case."""

    def __init__(self, case: OpCase) -> None:
        torch.manual_seed(0)
        self.case = case
        dtype = getattr(torch, case.dtype)
        self.isa = _isa(dtype, case.block_size, case.head_dim)
        columns = -(-case.kept // case.block_size)
        blocks = torch.randperm(case.rows * columns).view(case.rows, columns).int() + 1
        shape = (case.rows * columns + 1, case.kv_heads, case.block_size, 2 * case.head_dim)
        tensor = torch.zeros(shape, dtype=dtype)
        self.cache = PackedCache(tensor, self.isa)
        tokens = (len(tensor) * case.block_size, case.kv_heads, case.head_dim)
        self.cache.write(
            torch.randn(tokens).to(dtype), torch.randn(tokens).to(dtype), torch.arange(tokens[0], dtype=torch.int64)
        )
        self.query = torch.randn((case.rows, case.query_heads, case.head_dim)).to(dtype)
        self.output = torch.empty_like(self.query)
        self.scale = case.head_dim**-0.5
        group = case.query_heads // case.kv_heads
        width = max(1, -(-case.stored // SWAP_BLOCK_TOKENS))
        self.pool = SwapPool(1, case.rows * width, case.kv_heads, case.head_dim, dtype)
        self.pool.pages.normal_()
        swap_blocks = torch.randperm(case.rows * width).view(case.rows, width)
        if case.codec != "none":
            evicted = torch.randn((2, case.kv_heads, case.stored, case.head_dim)).to(dtype)
            needed = codec_of(case.codec, case.head_dim, dtype).blocks_for(case.stored)
            for blocks_of_row in swap_blocks:
                self.pool.write(0, blocks_of_row[:needed], *evicted, case.codec)
        self.table = StateTable(1, case.rows, case.kv_heads, group, case.head_dim, dtype)
        count = case.rows if case.stored else 0
        self.rows = DecodeRows(
            tokens=torch.arange(case.rows),
            slots=torch.arange(case.rows),
            blocks=blocks,
            start=torch.zeros(case.rows, dtype=torch.int64),
            end=torch.full((case.rows,), case.kept),
            block_size=case.block_size,
            calibrated=torch.arange(count),
            calibrated_slots=torch.arange(count),
            theta1=torch.full((count,), case.theta1),
            theta2=torch.full((count,), max(case.theta1, 0.85)),
            gate=torch.zeros(count, dtype=torch.int64),
            swap_blocks=swap_blocks[:count],
            stored=torch.full((count,), case.stored),
            codec=None if case.codec == "none" else torch.full((count,), number_of(case.codec)),
        )
        self.seq_lens = self.rows.end.int()
        self.starts = torch.arange(case.rows + 1, dtype=torch.int32)
        self.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.rows,
            num_heads=case.query_heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_lens=self.seq_lens,
            dtype=dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=False,
        )

    def stock(self) -> None:
        key_cache, value_cache = self.cache.tensor.view(
            len(self.cache.tensor), self.case.kv_heads, 2 * self.case.block_size, -1
        ).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=self.output,
            query_start_loc=self.starts,
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.rows.blocks,
            softcap=0,
            scheduler_metadata=self.scheduler_metadata,
            s_aux=None,
        )

    def native(self) -> torch.Tensor:
        return native.decode(self.rows, 0, self.query, self.cache, self.pool, self.table, self.scale)

    def torch(self) -> torch.Tensor:
        return cpu.decode(self.rows, 0, self.query, self.cache, self.pool, self.table, self.scale)


class Step:
    """All layers of one decode step."""

    def __init__(self, case: OpCase) -> None:
        self.layers = [Layer(case) for _ in range(LAYERS)]

    def stock(self) -> None:
        for layer in self.layers:
            layer.stock()

    def native(self) -> None:
        for layer in self.layers:
            layer.native()

    def torch(self) -> None:
        for layer in self.layers:
            layer.torch()


def measure(repeats: int) -> dict[str, Any]:
    """The tables: operators at equal kept length, the reload in GiB read again per second, and the look."""
    torch.set_num_threads(1)
    return {
        "operators": [_operators(case, repeats) for case in CASES],
        "reload": [_reload(c, repeats) for c in RELOADS],
        "looks": [_look(c, repeats) for c in LOOKS],
    }


def _operators(case: OpCase, repeats: int) -> dict[str, Any]:
    layer, step = Layer(case), Step(case)
    layer.stock()
    torch.testing.assert_close(layer.output.float(), layer.native(), rtol=2e-2, atol=2e-2)
    seconds = interleaved({"stock": step.stock, "native": step.native, "torch": step.torch}, repeats)
    return {
        "case": asdict(case),
        "isa": layer.isa,
        "load": load(),
        "best_ms_per_layer": {name: min(times) * 1e3 / LAYERS for name, times in seconds.items()},
        "native_to_stock": ratio(seconds["native"], seconds["stock"]),
        "torch_to_stock": ratio(seconds["torch"], seconds["stock"]),
    }


def _reload(case: OpCase, repeats: int) -> dict[str, Any]:
    """Every group recomputes: what that adds to a step, against a plain sum over the KV's bytes without a codec."""
    step, without = Layer(case), Layer(OpCase(**{**asdict(case), "stored": 0, "codec": "none"}))
    plain = step.pool.pages.view(torch.int64).flatten()
    seconds = interleaved({"native": step.native, "without": without.native, "read": plain.sum}, repeats)
    gib = plain.nbytes / 2**30
    reload = [a - b for a, b in zip(seconds["native"], seconds["without"], strict=True)]
    return {
        "case": asdict(case),
        "load": load(),
        "gib": gib,
        "best_seconds_per_gib": {"reload": min(reload) / gib, "read": min(seconds["read"]) / gib},
        "reload_to_read": ratio(reload, seconds["read"]),
    }


class Look(Layer):
    """A layer whose rows recall by pages and look at every step; a look reads the four pages of largest share."""

    def __init__(self, case: OpCase) -> None:
        super().__init__(OpCase(**{**asdict(case), "stored": 0}))
        rows, width = case.rows, swap_blocks_for(case.stored)
        dtype = self.query.dtype
        self.recall_pool = SwapPool(1, rows * width, case.kv_heads, case.head_dim, dtype)
        self.recall_pool.pages.normal_()
        self.store = RecallStore(1, rows, rows * width, 1, case.kv_heads, case.head_dim, dtype)
        self.store.codes.random_(0, 256)
        self.store.scales.fill_(1.0)
        blocks = torch.randperm(rows * width).view(rows, width)
        self.recalled = RecallRows(
            rows=torch.arange(rows),
            slots=torch.arange(rows),
            theta=torch.full((rows,), 2.0),
            eps=torch.zeros(rows),
            top_p=torch.full((rows,), torch.nan),
            most=torch.full((rows,), 4),
            buffer_size=torch.zeros(rows, dtype=torch.int64),
            stored=torch.full((rows,), case.stored),
            swap_blocks=blocks,
            sketch_blocks=blocks.flip(0),
            buffer_ids=torch.empty((rows, 0), dtype=torch.int64),
        )
        self.out = torch.randn(self.query.shape)
        self.lse = torch.randn(self.query.shape[:2])

    def look(self, op: RecallOp) -> None:
        op(self.recalled, 0, self.query, self.out, self.lse, self.recall_pool, self.table, self.store, self.scale)

    def read_all(self) -> torch.Tensor:
        """The bytes that the paper's rule would read."""
        return self.recall_pool.pages.view(torch.int64).sum()


def _look(case: OpCase, repeats: int) -> dict[str, Any]:
    """A look of every row and KV head, in C++ and in torch, and the attention over the kept tokens beside it."""
    layer = Look(case)
    seconds = interleaved(
        {
            "native": lambda: layer.look(native_recall.add_recalled),
            "torch": lambda: layer.look(recall.add_recalled),
            "kept": layer.native,
            "read all": layer.read_all,
        },
        repeats,
    )
    return {
        "case": asdict(case),
        "load": load(),
        "best_ms_per_layer": {name: min(times) * 1e3 for name, times in seconds.items()},
        "torch_to_native": ratio(seconds["torch"], seconds["native"]),
        "native_to_kept": ratio(seconds["native"], seconds["kept"]),
        "native_to_read_all": ratio(seconds["native"], seconds["read all"]),
    }


def _isa(dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, block_size, head_dim)
    if isa == "amx":
        torch.cpu._init_amx()
    return str(isa)
