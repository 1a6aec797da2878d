"""The C++ decode operator against the torch one: this machine's layouts, odd shapes, garbage around the tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_calidrop.algorithm.calibration import Gate, attention_state, cosine, merge_states
from vllm_calidrop.attention.metadata import DecodeRows
from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops import choice as decode
from vllm_calidrop.ops import cpp as native
from vllm_calidrop.ops.cpp import build
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference import decode as cpu
from vllm_calidrop.worker.measures import similarity_histogram
from vllm_calidrop.worker.state_table import StateTable

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

LAYERS, LAYER = 2, 1
TOLERANCE = 2e-6  # both read the same numbers and accumulate in float32


def layouts() -> list[tuple[str, int, torch.dtype]]:
    """(isa, block size, dtype) that vLLM could choose on this machine."""
    found = [("vec", 32, torch.float32), ("vec", 128, torch.bfloat16), ("vec", 32, torch.float16)]
    found += [("vec16", 16, torch.float32), ("vec16", 48, torch.bfloat16)]
    if torch.cpu._is_amx_tile_supported():
        found += [("amx", 32, torch.bfloat16), ("amx", 128, torch.bfloat16)]
    return found


def _taking_turns(values: Sequence[int], count: int) -> Tensor:
    return torch.tensor([values[index % len(values)] for index in range(count)], dtype=torch.int64)


class Case:
    """A batch of rows with random lengths; whatever is not attended is NaN."""

    def __init__(
        self, isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int, kv_heads: int = 2,
        thresholds: tuple[float, float] = (0.7, 0.85), stored: tuple[int, ...] = (0, 1, 16, 100, 129, 700),
        codecs: tuple[str, ...] = ("none",), most_reads: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        if isa == "amx":
            torch.cpu._init_amx()
        bs = block_size
        # Around a block's edges, with starts at its edges too.
        spans = [
            (0, 1),
            (0, bs),
            (bs - 1, bs),
            (bs - 1, bs + 1),
            (3, 2 * bs - 1),
            (5, 5 * bs),
            (1, 700),
            (bs // 2, 1301),
        ]
        start, end = (torch.tensor(ends) for ends in zip(*spans))
        rows = len(spans)
        columns = int(-(-end.max() // bs))
        blocks = (torch.randperm(rows * columns) + 1).view(rows, columns).int()
        tensor = torch.full((rows * columns + 1, kv_heads, bs, 2 * head_dim), torch.nan, dtype=dtype)
        self.cache = PackedCache(tensor, isa)
        key_cache, value_cache = tensor.view(len(tensor), kv_heads, 2 * bs, head_dim).chunk(2, dim=2)
        for row in range(rows):
            position = torch.arange(int(start[row]), int(end[row]))
            slots = blocks[row, position // bs].long() * bs + position % bs
            shape = (len(position), kv_heads, head_dim)
            keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
        beyond = torch.arange(columns) * bs >= end[:, None]
        blocks = torch.where(beyond, blocks[:, :1], blocks)

        stored_of = torch.tensor([stored[row % len(stored)] for row in range(rows)])
        calibrated = torch.nonzero(stored_of).flatten()
        count = stored_of[calibrated]
        width = int(-(-count.max() // SWAP_BLOCK_TOKENS)) if len(count) else 1
        swap_blocks = torch.randperm(len(count) * width).view(len(count), width)
        self.pool = SwapPool(LAYERS, len(count) * width + 1, kv_heads, head_dim, dtype)
        self.pool.pages.fill_(torch.nan)
        slots_of = torch.randperm(rows + 3)[:rows]
        self.table = StateTable(LAYERS, rows + 3, kv_heads, group, head_dim, dtype)
        self.queries = torch.randn((rows, kv_heads * group, head_dim)).to(dtype)
        for index, row in enumerate(calibrated.tolist()):
            tokens = int(count[index])
            keys, values = torch.randn((2, kv_heads, tokens, head_dim)).to(dtype)
            taken = swap_blocks[index, : -(-tokens // SWAP_BLOCK_TOKENS)]
            codec = codecs[index % len(codecs)]
            taken = taken[: self.pool.codecs[number_of(codec)].blocks_for(tokens)]
            self.pool.write(LAYER, taken, keys, values, codec)
            # Old queries near and far from the new ones, so that every branch is taken.
            old = self.queries[row].view(kv_heads, group, head_dim).float()
            old = (old + torch.randn_like(old) * torch.rand((kv_heads, group, 1)) * 1.5).to(dtype)
            self.table.put(LAYER, int(slots_of[row]), old, attention_state(old, keys, values, 0.1))
        theta1, theta2 = thresholds
        self.rows = DecodeRows(
            tokens=torch.arange(rows),
            slots=slots_of,
            blocks=blocks,
            start=start,
            end=end,
            block_size=bs,
            calibrated=calibrated,
            calibrated_slots=slots_of[calibrated],
            theta1=torch.full((len(calibrated),), theta1),
            theta2=torch.full((len(calibrated),), theta2),
            gate=torch.arange(len(calibrated)) % len(Gate),
            swap_blocks=swap_blocks,
            stored=count,
            codec=_taking_turns([number_of(codec) for codec in codecs], len(calibrated))
            if codecs != ("none",)
            else None,
            most_reads=_taking_turns(most_reads, len(calibrated)) if most_reads else None,
        )

    def run(self, op: decode.DecodeOp, **more: Tensor) -> tuple[Tensor, StateTable]:
        table = StateTable.__new__(StateTable)
        table.query, table.out = self.table.query.clone(), self.table.out.clone()
        table.lse, table.counts = self.table.lse.clone(), self.table.counts.clone()
        table.similarity = similarity_histogram()
        scale = self.cache.head_dim**-0.5
        return op(self.rows, LAYER, self.queries, self.cache, self.pool, table, scale, **more), table


def assert_same(case: Case, tolerance: float = TOLERANCE) -> StateTable:
    expected, expected_table = case.run(cpu.decode)
    out, table = case.run(native.decode)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(table.out, expected_table.out, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(table.lse, expected_table.lse, rtol=1e-5, atol=tolerance)
    assert torch.equal(table.query, expected_table.query)
    assert torch.equal(table.counts, expected_table.counts)
    assert torch.equal(table.similarity[:-1], expected_table.similarity[:-1])
    observed = int(table.similarity[:-1].sum())
    assert abs(int(table.similarity[-1] - expected_table.similarity[-1])) <= 2 * observed
    return table


@pytest.mark.parametrize(("isa", "block_size", "dtype"), layouts())
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (2, 128), (3, 32), (4, 64), (4, 128), (5, 96), (7, 64), (8, 32)]
)
def test_equals_torch(isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int) -> None:
    table = assert_same(Case(isa, block_size, dtype, group, head_dim))
    counts = table.counts[:, LAYER].sum(0)
    assert (counts[[0, 2, 3]] > 0).all(), "every branch must be taken"
    assert table.similarity[:-1].sum() == counts[:3].sum(), "one similarity per decision"


@pytest.mark.parametrize("thresholds", [(2.0, 2.0), (-2.0, -2.0), (-2.0, 2.0), (0.6, 0.6)])
@pytest.mark.parametrize("group", [1, 4])
def test_extreme_thresholds(thresholds: tuple[float, float], group: int) -> None:
    assert_same(Case("vec", 32, torch.float32, group, 64, thresholds=thresholds))


@pytest.mark.parametrize("op", [cpu.decode, native.decode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_where_the_batch_lies(op: decode.DecodeOp, dtype: torch.dtype) -> None:
    """Queries inside a wider tensor, as Q, K and V of a model lie; the output in their dtype, rounded as torch does."""
    case = Case("vec", 32, dtype, 4, 64)
    expected, _ = case.run(op)
    wide = torch.randn((len(case.queries), 2 * case.queries[0].numel())).to(dtype)
    wide[:, : case.queries[0].numel()] = case.queries.flatten(1)
    case.queries = wide[:, : case.queries[0].numel()].view(case.queries.shape)
    batch = torch.full((len(expected) + 2, *expected.shape[1:]), 7.0, dtype=dtype)
    out, _ = case.run(op, out=batch[1:-1])
    assert out.data_ptr() == batch[1].data_ptr()
    assert torch.equal(out, expected.to(dtype))
    assert (batch[[0, -1]] == 7).all()


def test_no_row_is_calibrated() -> None:
    assert_same(Case("vec", 32, torch.float32, 4, 64, stored=(0,)))


def test_head_dims_that_are_odd_multiples_of_16() -> None:
    assert_same(Case("vec16", 16, torch.float32, 4, 80))
    assert_same(Case("vec16", 32, torch.float32, 4, 112))


def test_threads_share_the_rows() -> None:
    case = Case("vec", 32, torch.float32, 4, 64, kv_heads=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert_same(case)
    finally:
        torch.set_num_threads(threads)


def test_large_logits() -> None:
    """One token takes nearly all the weight; the running maximum moves between chunks."""
    case = Case("vec", 32, torch.float32, 4, 64)
    case.queries *= 30
    assert_same(case, tolerance=1e-4)  # logits of some hundred: their own rounding shows


def test_log_sum_exp_is_of_all_that_was_attended() -> None:
    case = Case("vec", 32, torch.float32, 4, 64, kv_heads=2)
    lse = torch.empty(case.queries.shape[:2])
    out, table = case.run(native.decode, lse=lse)
    rows, scale = case.rows, 64**-0.5
    grouped = case.queries.view(len(out), 2, 4, 64)
    keys, values = case.cache.read(rows.blocks)
    kept = attention_state(grouped, keys, values, scale, rows.valid[:, None])
    for row in range(len(out)):
        expected = type(kept)(kept.out[row], kept.lse[row])
        index = torch.nonzero(rows.calibrated == row).flatten().tolist()
        if index:
            old = case.table.query[LAYER, rows.slots[row]]
            new = table.query[LAYER, rows.slots[row]]
            renewed = (new != old).any(-1)
            merges = renewed | (cosine(grouped[row], old) > 0.85)
            if rows.gate[index[0]] == Gate.GROUP_MEAN:
                merges = renewed | (cosine(grouped[row], old).mean(-1, keepdim=True) > 0.85)
            evicted = type(kept)(
                table.out[LAYER, rows.slots[row]],
                torch.where(merges, table.lse[LAYER, rows.slots[row]], -torch.inf),
            )
            expected = merge_states(expected, evicted)
        torch.testing.assert_close(lse[row].view(2, 4), expected.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("isa", "block_size", "dtype"), layouts())
@pytest.mark.parametrize(
    ("group", "head_dim", "first", "queries"),
    [(1, 64, 0, 100), (4, 64, 300, 33), (3, 32, 17, 64), (2, 128, 0, 1), (8, 96, 5, 31)],
)
def test_column_sums_equal_torch(
    isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int, first: int, queries: int
) -> None:
    """Also: nothing beyond the last query's own token is looked at, and queries need not lie densely."""
    torch.manual_seed(0)
    kv_heads, tokens = 2, first + queries
    if isa == "amx":
        torch.cpu._init_amx()
    columns = -(-tokens // block_size)
    blocks = torch.randperm(columns + 3)[:columns].int()
    tensor = torch.full((columns + 3, kv_heads, block_size, 2 * head_dim), torch.nan, dtype=dtype)
    cache = PackedCache(tensor, isa)
    position = torch.arange(tokens)
    keys = torch.randn((tokens, kv_heads, head_dim)).to(dtype)
    cache.write(keys, keys, blocks[position // block_size].long() * block_size + position % block_size)
    asked = torch.randn((queries, 3, kv_heads * group, head_dim)).to(dtype)[:, 1] * 2
    expected = torch.rand((kv_heads, tokens + 7))
    sums = expected.clone()
    cpu.add_column_sums(expected, asked, blocks, cache, first, head_dim**-0.5)
    native.add_column_sums(sums, asked, blocks, cache, first, head_dim**-0.5)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_unknown_layouts_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_layouts", lambda *_: None)
    case = Case("vec", 32, torch.float32, 4, 64)
    assert torch.equal(case.run(native.decode)[0], case.run(cpu.decode)[0])


def _build_in(folder: str) -> str:
    return str(build.library(Path(folder)))


def test_several_processes_build_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as workers:
        built = set(workers.map(_build_in, [str(tmp_path)] * 3))
    assert len(built) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = decode.uses_native.__wrapped__
    assert choose()
    assert decode.decode_op() is native.decode and decode.column_sums_op() is native.add_column_sums
    monkeypatch.setenv(decode.CHOICE_VARIABLE, "torch")
    assert not choose()
    monkeypatch.setenv(decode.CHOICE_VARIABLE, "fast")
    with pytest.raises(ValueError, match="fast"):
        choose()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The torch operator serves, and the log says so; asking for C++ is then an error."""
    native.load.cache_clear()
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert not decode.uses_native.__wrapped__()
        monkeypatch.setenv(decode.CHOICE_VARIABLE, "native")
        with pytest.raises(build.BuildError):
            decode.uses_native.__wrapped__()
    finally:
        native.load.cache_clear()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: "/bin/false")
    with pytest.raises(build.BuildError, match="failed"):
        build.library(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_every_source_is_shipped() -> None:
    """setup.py packs *.cpp and *.h; the list here is what the build reads."""
    assert {path.suffix for path in build.SOURCES.iterdir() if path.is_file()} <= {".cpp", ".h", ".py"}
    assert list(build.SOURCES.glob("*.cpp"))
