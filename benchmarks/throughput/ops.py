"""The decode operators at equal kept length: vLLM's own, ours in C++ and in torch; the reload against memory speed;
the look of recall by pages."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops

from benchmarks.operators import Layers, filled_cache, isa_of, rows_of, sequence
from benchmarks.throughput.timing import interleaved, load, ratio
from vllm_calidrop.evicted.codecs import codec_of
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.ops.cpp import CppSet
from vllm_calidrop.ops.reference import ReferenceSet
from vllm_calidrop.records import RecallRecord


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
    """Everything one call of an operator needs, for a case. Rows that recall by pages look at every step and read the
    four pages of largest share.
    """

    def __init__(self, case: OpCase, by_pages: bool = False) -> None:
        torch.manual_seed(0)
        self.case = case
        dtype = getattr(torch, case.dtype)
        self.isa = isa_of(dtype, case.block_size, case.head_dim)
        group = case.query_heads // case.kv_heads
        self.model = ModelKV(dtype, case.kv_heads, group, case.head_dim, case.block_size, self.isa)
        columns = -(-case.kept // case.block_size)
        self.cache, block_table = filled_cache(self.model, case.rows, columns, [(0, case.kept)] * case.rows)
        self.query = torch.randn((case.rows, case.query_heads, case.head_dim)).to(dtype)
        self.output = torch.empty_like(self.query)
        self.scale = case.head_dim**-0.5
        width = max(1, -(-case.stored // SWAP_BLOCK_TOKENS))
        sketched = case.rows * width if by_pages else 0
        self.layers = Layers(self.model, case.rows, case.rows * width, sketch_blocks=sketched)
        self.layers.pool.pages.normal_()
        self.layers.store.codes.random_(0, 256)
        self.layers.store.scales.fill_(1.0)
        swap_blocks = torch.randperm(case.rows * width).view(case.rows, width)
        evicted = torch.randn((2, case.kv_heads, case.stored, case.head_dim)).to(dtype)
        needed = codec_of(case.codec, case.head_dim, dtype).blocks_for(case.stored)
        for row, blocks in enumerate(swap_blocks.tolist()):
            mine = tuple(blocks[:needed])
            if case.codec != "none":
                self.layers.pool.write(0, mine, *evicted, case.codec)
            recall = RecallRecord(2.0, 0.0, None, 4, tuple(blocks[::-1]), ()) if by_pages else None
            thetas = (case.theta1, max(case.theta1, 0.85))
            self.layers.admit(sequence(row, 0, case.stored, mine, case.codec, thetas, recall=recall))
        self.cpp = self.layers.served_by(CppSet)
        self.reference = self.layers.served_by(ReferenceSet)
        self.rows = rows_of(torch.arange(case.rows), torch.full((case.rows,), case.kept), block_table)
        self.seq_lens = self.rows.end
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
            block_table=self.rows.block_table,
            softcap=0,
            scheduler_metadata=self.scheduler_metadata,
            s_aux=None,
        )

    def native(self) -> None:
        self.cpp.decode(self.query, self.output, self.cache, 0, self.rows, self.scale)

    def torch(self) -> None:
        self.reference.decode(self.query, self.output, self.cache, 0, self.rows, self.scale)

    def read_all(self) -> torch.Tensor:
        """The bytes that the paper's rule would read."""
        return self.layers.pool.pages.view(torch.int64).sum()


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
    expected = layer.output.clone()
    layer.native()
    torch.testing.assert_close(layer.output, expected, rtol=2e-2, atol=2e-2)
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
    plain = step.layers.pool.pages.view(torch.int64).flatten()
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


def _look(case: OpCase, repeats: int) -> dict[str, Any]:
    """What a look of every row and KV head adds to a step, in C++ and in torch, and the step without it beside it."""
    layer, without = Layer(case, by_pages=True), Layer(OpCase(**{**asdict(case), "stored": 0}))
    seconds = interleaved(
        {
            "native step": layer.native,
            "torch step": layer.torch,
            "kept": without.native,
            "kept in torch": without.torch,
            "read all": layer.read_all,
        },
        repeats,
    )
    for name, kept in (("native", "kept"), ("torch", "kept in torch")):
        pairs = zip(seconds.pop(f"{name} step"), seconds[kept], strict=True)
        seconds[name] = [step - alone for step, alone in pairs]
    del seconds["kept in torch"]
    return {
        "case": asdict(case),
        "load": load(),
        "best_ms_per_layer": {name: min(times) * 1e3 for name, times in seconds.items()},
        "torch_to_native": ratio(seconds["torch"], seconds["native"]),
        "native_to_kept": ratio(seconds["native"], seconds["kept"]),
        "native_to_read_all": ratio(seconds["native"], seconds["read all"]),
    }
