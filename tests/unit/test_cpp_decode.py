"""The C++ operators against the reference ones: this machine's layouts, odd shapes, garbage around the tokens."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.operators import Layers, filled_cache, rows_of, sequence
from vllm_calidrop.algorithm.calibration import Gate, attention_state
from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS
from vllm_calidrop.ops import registry
from vllm_calidrop.ops.base import ModelKV, OperatorSet
from vllm_calidrop.ops.cpp import CppSet, build, library
from vllm_calidrop.ops.reference import ReferenceSet

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

LAYERS, LAYER = 2, 1
TOLERANCE = 2e-6  # both read the same numbers and accumulate in float32
# Outputs are in the model's dtype: a sum that is another one in its last bit may round to the next number.
ROUNDING = {torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def layouts() -> list[tuple[str, int, torch.dtype]]:
    """(isa, block size, dtype) that vLLM could choose on this machine."""
    found = [("vec", 32, torch.float32), ("vec", 128, torch.bfloat16), ("vec", 32, torch.float16)]
    found += [("vec16", 16, torch.float32), ("vec16", 48, torch.bfloat16)]
    if torch.cpu._is_amx_tile_supported():
        found += [("amx", 32, torch.bfloat16), ("amx", 128, torch.bfloat16)]
    return found


class Case:
    """A batch of rows with random lengths; whatever is not attended is NaN. The last row is padding."""

    def __init__(
        self, isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int, kv_heads: int = 2,
        thresholds: tuple[float, float] = (0.7, 0.85), stored: tuple[int, ...] = (0, 1, 16, 100, 129, 700),
        codecs: tuple[str, ...] = ("none",), most_reads: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        if isa == "amx":
            torch.cpu._init_amx()
        bs = block_size
        self.model = ModelKV(dtype, kv_heads, group, head_dim, bs, isa)
        # Around a block's edges, with starts at its edges too; the first columns of some rows are never read.
        spans = [(0, 1), (0, bs), (bs - 1, bs), (bs - 1, bs + 1), (3, 2 * bs - 1), (5, 5 * bs), (1, 700)]
        spans += [(bs // 2, 1301), (3 * bs + 5, 4 * bs)]
        rows = len(spans)
        self.cache, blocks = filled_cache(self.model, rows, -(-1301 // bs), spans)
        start = torch.tensor([span[0] for span in spans])
        end = torch.tensor([span[1] for span in spans])
        column = torch.arange(blocks.shape[1]) * bs
        unread = (column + bs <= start[:, None]) | (column >= end[:, None])
        blocks = torch.where(unread, torch.iinfo(torch.int32).max, blocks)

        self.stored = [stored[row % len(stored)] for row in range(rows)]
        width = max(1, -(-max(self.stored) // SWAP_BLOCK_TOKENS))
        swap_blocks = torch.randperm(rows * width).view(rows, width)
        self.layers = Layers(self.model, rows + 3, rows * width, LAYERS)
        slots = torch.randperm(rows + 3)[:rows]
        self.queries = torch.randn((rows + 1, kv_heads * group, head_dim)).to(dtype)
        self.records = []
        calibrated = 0
        for row, tokens in enumerate(self.stored):
            codec = codecs[calibrated % len(codecs)] if tokens else "none"
            encoding = self.layers.pool.codecs[number_of(codec)]
            taken = tuple(swap_blocks[row, : encoding.blocks_for(tokens)].tolist())
            most = most_reads[calibrated % len(most_reads)] if most_reads else None
            record = sequence(
                int(slots[row]), int(start[row]), tokens, taken, codec, thresholds, calibrated % len(Gate), most
            )
            self.layers.admit(record)
            self.records.append(record)
            if not tokens:
                continue
            calibrated += 1
            keys, values = torch.randn((2, kv_heads, tokens, head_dim)).to(dtype)
            self.layers.pool.write(LAYER, taken, keys, values, codec)
            # Old queries near and far from the new ones, so that every branch is taken.
            old = self.queries[row].view(kv_heads, group, head_dim).float()
            old = (old + torch.randn_like(old) * torch.rand((kv_heads, group, 1)) * 1.5).to(dtype)
            state, evicted = self.layers.table.layers[LAYER], attention_state(old, keys, values, 0.1)
            state.query[record.slot] = old
            state.out[record.slot], state.lse[record.slot] = evicted
        padding = torch.full((1, blocks.shape[1]), torch.iinfo(torch.int32).max)
        self.rows = rows_of(
            torch.cat((slots, slots[:1])), torch.cat((end, torch.zeros(1))), torch.cat((blocks, padding))
        )

    def run(self, operators: type[OperatorSet], out: Tensor | None = None) -> tuple[Tensor, Layers]:
        layers = self.layers.copy()
        out = torch.full(self.queries.shape, 7.0, dtype=self.queries.dtype) if out is None else out
        served = layers.served_by(operators)
        served.decode(self.queries, out, self.cache, LAYER, self.rows, self.model.head_dim**-0.5)
        return out, layers


def assert_same(case: Case, tolerance: float = TOLERANCE) -> Layers:
    expected, expected_layers = case.run(ReferenceSet)
    out, layers = case.run(CppSet)
    torch.testing.assert_close(out, expected, rtol=1e-5 + ROUNDING[out.dtype], atol=tolerance)
    assert (out[-1] == 7).all(), "a padding row was written"
    table, expected_table = layers.table, expected_layers.table
    torch.testing.assert_close(table.out, expected_table.out, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(table.lse, expected_table.lse, rtol=1e-5, atol=tolerance)
    assert torch.equal(table.query, expected_table.query)
    assert torch.equal(table.counts, expected_table.counts)
    assert torch.equal(layers.similarity[:-1], expected_layers.similarity[:-1])
    observed = int(layers.similarity[:-1].sum())
    assert abs(int(layers.similarity[-1] - expected_layers.similarity[-1])) <= 2 * observed
    return layers


@pytest.mark.parametrize(("isa", "block_size", "dtype"), layouts())
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (2, 128), (3, 32), (4, 64), (4, 128), (5, 96), (7, 64), (8, 32)]
)
def test_equals_the_reference(isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int) -> None:
    layers = assert_same(Case(isa, block_size, dtype, group, head_dim))
    counts = layers.table.counts[:, LAYER].sum(0)
    assert (counts[[0, 2, 3]] > 0).all(), "every branch must be taken"
    assert layers.similarity[:-1].sum() == counts[:3].sum(), "one similarity per decision"


@pytest.mark.parametrize("thresholds", [(2.0, 2.0), (-2.0, -2.0), (-2.0, 2.0), (0.6, 0.6)])
@pytest.mark.parametrize("group", [1, 4])
def test_extreme_thresholds(thresholds: tuple[float, float], group: int) -> None:
    assert_same(Case("vec", 32, torch.float32, group, 64, thresholds=thresholds))


@pytest.mark.parametrize("operators", [ReferenceSet, CppSet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_where_the_batch_lies(operators: type[OperatorSet], dtype: torch.dtype) -> None:
    """Queries inside a wider tensor, as Q, K and V of a model lie, and an output inside another one."""
    case = Case("vec", 32, dtype, 4, 64)
    expected, _ = case.run(operators)
    wide = torch.randn((len(case.queries), 2 * case.queries[0].numel())).to(dtype)
    wide[:, : case.queries[0].numel()] = case.queries.flatten(1)
    case.queries = wide[:, : case.queries[0].numel()].view(case.queries.shape)
    batch = torch.full((len(expected) + 2, *expected.shape[1:]), 7.0, dtype=dtype)
    case.run(operators, out=batch[1:-1])
    assert torch.equal(batch[1:-1], expected)
    assert (batch[[0, -1]] == 7).all()


def test_rows_answer_the_tokens_they_name() -> None:
    """Rows in any order among a batch's tokens; what is nobody's stays."""
    case = Case("vec", 32, torch.float32, 4, 64)
    expected, _ = case.run(CppSet)
    token = torch.randperm(2 * len(case.rows.slot))[: len(case.rows.slot)]
    queries = torch.randn((2 * len(case.queries), *case.queries.shape[1:]))
    queries[token] = case.queries
    case.queries, case.rows = queries, case.rows._replace(token=token.int())
    for operators in (CppSet, ReferenceSet):
        out, _ = case.run(operators)
        torch.testing.assert_close(out[token], expected, rtol=1e-5, atol=TOLERANCE)
        others = torch.ones(len(out), dtype=torch.bool)
        others[token] = False
        assert (out[others] == 7).all()


def test_no_row_is_calibrated() -> None:
    assert_same(Case("vec", 32, torch.float32, 4, 64, stored=(0,)))


def test_head_dims_that_are_odd_multiples_of_16() -> None:
    assert_same(Case("vec16", 16, torch.float32, 4, 80))
    assert_same(Case("vec16", 32, torch.float32, 4, 112))


def test_threads_share_the_rows() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert_same(Case("vec", 32, torch.float32, 4, 64, kv_heads=3))
    finally:
        torch.set_num_threads(threads)


def test_large_logits() -> None:
    """One token takes nearly all the weight; the running maximum moves between chunks."""
    case = Case("vec", 32, torch.float32, 4, 64)
    case.queries *= 30
    assert_same(case, tolerance=1e-4)  # logits of some hundred: their own rounding shows


@pytest.mark.parametrize(("isa", "block_size", "dtype"), layouts())
@pytest.mark.parametrize(
    ("group", "head_dim", "first", "queries"),
    [(1, 64, 0, 100), (4, 64, 300, 33), (3, 32, 17, 64), (2, 128, 0, 1), (8, 96, 5, 31)],
)
def test_column_sums_equal_the_reference(
    isa: str, block_size: int, dtype: torch.dtype, group: int, head_dim: int, first: int, queries: int
) -> None:
    """Also: nothing beyond the last query's own token is looked at, and queries need not lie densely."""
    torch.manual_seed(0)
    kv_heads, tokens = 2, first + queries
    if isa == "amx":
        torch.cpu._init_amx()
    model = ModelKV(dtype, kv_heads, group, head_dim, block_size, isa)
    cache, blocks = filled_cache(model, 1, -(-tokens // block_size) + 2, [(0, tokens)])
    asked = torch.randn((queries, 3, kv_heads * group, head_dim)).to(dtype)[:, 1] * 2
    expected = torch.rand((kv_heads, tokens + 7))
    sums = expected.clone()
    layers = Layers(model, 1, 1)
    for operators, into in ((ReferenceSet, expected), (CppSet, sums)):
        layers.served_by(operators).observe(into, asked, cache, blocks[0], first, head_dim**-0.5)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("isa", "block_size", "dtype"), layouts())
@pytest.mark.parametrize("operators", [ReferenceSet, CppSet])
def test_tokens_are_taken_and_put(operators: type[OperatorSet], isa: str, block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if isa == "amx":
        torch.cpu._init_amx()
    model = ModelKV(dtype, 3, 2, 64, block_size, isa)
    tokens = 5 * block_size + 3
    cache, blocks = filled_cache(model, 1, 6, [(0, tokens)])
    served = Layers(model, 1, 1).served_by(operators)
    index = torch.rand((3, tokens)).argsort(-1)[:, :70].sort(-1).values
    keys, values = served.take(cache, blocks[0], index)
    every_key, every_value = (x[0, :, :tokens] for x in cache.read(blocks))
    where = index.unsqueeze(-1).expand(-1, -1, 64)
    assert torch.equal(keys, every_key.gather(1, where)) and torch.equal(values, every_value.gather(1, where))
    served.put(cache, blocks[0], tokens - 70, keys, values)
    last = torch.arange(tokens - 70, tokens).expand(3, -1)
    assert all(torch.equal(a, b) for a, b in zip(served.take(cache, blocks[0], last), (keys, values), strict=True))


def test_a_cache_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name where C++ was asked for; otherwise the reference operators serve, which the log says."""
    monkeypatch.setattr(library, "layouts_of", lambda _model: None)
    model = ModelKV(torch.float32, 2, 2, 64, 32, "vec")
    assert registry.set_for(model) is ReferenceSet
    monkeypatch.setenv(registry.CHOICE_VARIABLE, "cpp")
    with pytest.raises(ValueError, match=r"layout 'vec' for torch.float32, head_dim 64 and block size 32.*=cpp"):
        registry.set_for(model)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelKV(torch.float32, 2, 2, 64, 32, "vec")
    assert registry.set_for(model) is CppSet
    monkeypatch.setenv(registry.CHOICE_VARIABLE, "reference")
    assert registry.set_for(model) is ReferenceSet
    monkeypatch.setenv(registry.CHOICE_VARIABLE, "fast")
    with pytest.raises(ValueError, match="fast"):
        registry.set_for(model)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reference operators serve, and the log says so; asking for C++ is then an error."""
    library.load.cache_clear()
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ModelKV(torch.float32, 2, 2, 64, 32, "vec")
    try:
        with caplog.at_level("WARNING", "vllm.calidrop"):
            assert registry.set_for(model) is ReferenceSet
        assert "no C++ compiler found" in caplog.text
        monkeypatch.setenv(registry.CHOICE_VARIABLE, "cpp")
        with pytest.raises(ValueError, match="no C"):
            registry.set_for(model)
    finally:
        library.load.cache_clear()


def _build_in(folder: str) -> str:
    return str(build.library(Path(folder)))


def test_several_processes_build_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as workers:
        built = set(workers.map(_build_in, [str(tmp_path)] * 3))
    assert len(built) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: "/bin/false")
    with pytest.raises(build.BuildError, match="failed"):
        build.library(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_every_source_is_shipped() -> None:
    """setup.py packs *.cpp and *.h; the list here is what the build reads."""
    assert {path.suffix for path in build.SOURCES.iterdir() if path.is_file()} <= {".cpp", ".h", ".py"}
    assert list(build.SOURCES.glob("*.cpp"))
