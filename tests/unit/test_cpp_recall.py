"""Recall by pages in C++ against the reference: pages, states, buffers and counters, step by step."""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.operators import Layers, filled_cache, rows_of, sequence
from vllm_calidrop.algorithm.calibration import AttentionState, attention_state, cosine, merge_states
from vllm_calidrop.evicted.layout import pages_for, swap_blocks_for
from vllm_calidrop.evicted.recall.looks import page_shares
from vllm_calidrop.evicted.recall.sketch import estimate, inflation
from vllm_calidrop.ops.base import ModelKV, OperatorSet
from vllm_calidrop.ops.cpp import CppSet, build, library
from vllm_calidrop.ops.reference import ReferenceSet
from vllm_calidrop.ops.reference.recall import RecallRows
from vllm_calidrop.ops.state import refuse_heads
from vllm_calidrop.records import COUNTERS, RecallRecord

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

LAYERS, LAYER, SCALE, KEPT = 2, 1, 0.25, 40
NEAR = 2e-5  # relative: nearer shares are not told apart by two ways to add up
ROUNDING = {torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of outputs in the model's dtype

How = tuple[float, float, float | None, int, int, str]  # theta, eps, top_p, most, buffer places, rest
HOW: tuple[How, ...] = (
    (0.9, 0.02, None, 4, 0, "none"),
    (0.9, 0.05, None, 4, 4, "none"),
    (0.5, 0.0, None, 1000, 0, "none"),
    (2.0, 0.001, None, 3, 2, "none"),
    (2.0, 0.0, 0.9, 64, 0, "none"),
    (0.8, 0.0, 0.7, 5, 7, "none"),
    (2.0, 0.0, 1.0, 1000, 64, "none"),
    (-2.0, 0.95, None, 2, 1, "none"),
)
HOW_WITH_REST: tuple[How, ...] = (
    (2.0, 0.1, None, 4, 0, "v2"),
    (2.0, 0.02, None, 4, 4, "v2"),
    (2.0, 1.0, None, 4, 0, "v1"),
    (0.8, 0.05, None, 3, 2, "v1"),
    (0.8, 0.001, None, 5, 0, "v2"),
    (2.0, 0.0, 0.7, 5, 7, "v2"),
    (2.0, 0.0, None, 1000, 64, "v1"),
    (0.9, 0.05, None, 4, 4, "none"),
)
STORED = (1, 16, 17, 100, 128, 129, 700, 1311)


def recall_of(row: int, blocks: list[int], buffer_ids: list[int]) -> RecallRecord:
    theta, eps, top_p, most, _, rest = HOW[row % len(HOW)]
    return RecallRecord(theta, eps, top_p, most, tuple(blocks), tuple(buffer_ids), rest)


class Case:
    """Rows of all lengths and settings; whatever is nobody's is NaN, or the largest code. Two rows recall nothing."""

    def __init__(self, dtype: torch.dtype, group: int, head_dim: int, kv_heads: int = 2, refused: bool = True) -> None:
        torch.manual_seed(0)
        count = 2 * len(HOW)
        stored = [STORED[(row + row // len(HOW)) % len(STORED)] for row in range(count)]
        total = sum(map(swap_blocks_for, stored))
        blocks, places = torch.randperm(total).tolist(), torch.randperm(sum(how[4] for how in HOW) * 2).tolist()
        slots = torch.randperm(count + 5)[: count + 2].tolist()
        self.model = ModelKV(dtype, kv_heads, group, head_dim, 16, "vec16")
        self.layers = Layers(self.model, count + 5, total, LAYERS, total, len(places), 2048, "v2")
        pool, store = self.layers.pool, self.layers.store
        for row in range(count + 2):
            tokens = stored[row] if row < count else 0
            mine = [blocks.pop() for _ in range(swap_blocks_for(tokens))]
            buffer_ids = [places.pop() for _ in range(HOW[row % len(HOW)][4])] if tokens else []
            recall = recall_of(row, mine, buffer_ids) if tokens else None
            record = sequence(slots[row], 3, tokens, tuple(mine[::-1]), recall=recall)
            self.layers.admit(record)
            if not tokens:
                continue
            keys, values = torch.randn((2, kv_heads, tokens, head_dim))
            keys = (1.5 * keys + torch.randn((kv_heads, 1, head_dim))).to(dtype)
            pool.write(LAYER, record.swap_blocks, keys, values.to(dtype))
            store.put_sketch(LAYER, record, keys, keys, torch.randn((32, kv_heads * group, head_dim)))
            if recall is not None and recall.rest != "none":
                store.put_values(LAYER, record, values.to(dtype), values.to(dtype))
        if refused:  # the codec found NaN in what this row's first KV head evicted
            store.refuse(LAYER, slots[3], torch.arange(kv_heads) == 0)
            refuse_heads(self.layers.table.layers[LAYER], slots[3], torch.arange(kv_heads) == 0)
        spans = [(3, KEPT)] * (count + 2)
        self.cache, block_table = filled_cache(self.model, count + 2, 3, spans)
        order = torch.randperm(count + 2)
        self.slots = torch.tensor(slots)[order]
        self.rows = rows_of(self.slots, torch.full((count + 2,), KEPT), block_table)
        self.recalls = order < count
        self.queries = torch.randn((count + 2, kv_heads * group, head_dim))

    def turn(self) -> None:
        """Queries that turn a little in some rows and a lot in others."""
        turn = torch.rand((len(self.queries), 1, 1)) ** 3
        turned = torch.lerp(self.queries.float(), torch.randn(self.queries.shape) * 1.5, turn)
        self.queries = turned.to(self.model.dtype)

    @property
    def kept(self) -> AttentionState:
        """The state over the kept tokens, [rows, H, G, D]."""
        keys, values = self.cache.read(self.rows.block_table)
        grouped = self.queries.unflatten(1, (self.model.num_kv_heads, -1))
        return attention_state(grouped, keys[:, :, 3:KEPT], values[:, :, 3:KEPT], SCALE)

    def step(self, operators: type[OperatorSet]) -> tuple[Tensor, Layers]:
        layers = self.layers.copy()
        out = torch.full(self.queries.shape, 7.0, dtype=self.queries.dtype)
        layers.served_by(operators).decode(self.queries, out, self.cache, LAYER, self.rows, SCALE)
        return out, layers


def ties(case: Case) -> Tensor:
    """bool [rows]: a look gate, a page or an order that rounding could decide either way."""
    mine = torch.nonzero(case.recalls).flatten()
    slots = case.slots[mine]
    rows = RecallRows.of(slots, case.layers.tables)
    kv_heads = case.model.num_kv_heads
    grouped = case.queries[mine].unflatten(1, (kv_heads, -1))
    rho = cosine(grouped, case.layers.table.query[LAYER, slots]).amin(-1)
    found = ((rho - rows.theta[:, None]).abs() < 1e-6).any(-1)
    every_head, kept_lse = torch.arange(kv_heads), case.kept.lse[mine]
    for i in range(len(found)):
        stored = int(rows.stored[i])
        blocks = rows.sketch_blocks[i, : swap_blocks_for(stored)].expand(kv_heads, -1)
        rest = rows.rest[i].expand(kv_heads)
        sketch = case.layers.store.sketch(LAYER, slots[i].expand(kv_heads), blocks, every_head, rest)
        noise = inflation(grouped[i], sketch.scales, sketch.balance, SCALE) if rest[0] else 0.0
        logits = estimate(grouped[i], *sketch) * SCALE - noise
        shares = page_shares(logits, rows.stored[i].expand(kv_heads), kept_lse[i])[..., : pages_for(stored)]
        share, order = shares.amax(1).sort(descending=True)
        unread = shares.gather(-1, order.unsqueeze(1).expand_as(shares)).flip(-1).cumsum(-1).amax(1)
        edges = [share[:, :-1] / share[:, 1:] - 1, share / rows.eps[i].clamp_min(1e-30) - 1]
        edges.append(unread / (1 - rows.top_p[i]).clamp_min(1e-30) - 1)
        found[i] |= any(bool((edge.abs() < NEAR).any()) for edge in edges)
    return torch.zeros(len(case.slots), dtype=torch.bool).index_put((mine,), found)


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.float32, 1, 64), (torch.float32, 7, 32), (torch.float32, 2, 80), (torch.bfloat16, 4, 128),
        (torch.float16, 3, 96),
    ],
)  # fmt: skip
def test_equals_the_reference(dtype: torch.dtype, group: int, head_dim: int) -> None:
    compare(Case(dtype, group, head_dim))


def compare(case: Case, steps: int = 4, apart_by: float = 3e-6) -> None:
    """Both take the same steps from the same state; rows at a tie are set aside, and are few."""
    tied = 0
    for _ in range(steps):
        case.turn()
        apart = ties(case)
        tied += int(apart.sum())
        (result, layers), (cpp_result, cpp_layers) = (case.step(operators) for operators in (ReferenceSet, CppSet))
        table, cpp_table, store, cpp_store = layers.table, cpp_layers.table, layers.store, cpp_layers.store
        slots = case.slots[~apart]
        close = {"rtol": 1e-5, "atol": apart_by}
        rounded = {"rtol": 1e-5 + ROUNDING[case.model.dtype], "atol": apart_by + ROUNDING[case.model.dtype] / 4}
        torch.testing.assert_close(cpp_result[~apart], result[~apart], **rounded)
        assert torch.equal(cpp_table.counts[slots], table.counts[slots])
        assert torch.equal(cpp_table.query[:, slots], table.query[:, slots])
        torch.testing.assert_close(cpp_table.lse[:, slots], table.lse[:, slots], **close)
        stored = table.lse[:, slots] > -math.inf  # the state over nothing has no output
        torch.testing.assert_close(cpp_table.out[:, slots][stored], table.out[:, slots][stored], **close)
        recalling = case.slots[case.recalls]
        assert store.looked[LAYER, recalling].all() and cpp_store.looked[LAYER, recalling].all()
        assert torch.equal(cpp_layers.similarity[:-1], layers.similarity[:-1]) or apart.any()
        rows = RecallRows.of(case.slots[~apart & case.recalls], case.layers.tables)
        mine = torch.cat([ids[: int(size)] for ids, size in zip(rows.buffer_ids, rows.buffer_size, strict=True)])
        assert torch.equal(cpp_store.held[:, mine], store.held[:, mine])
        assert torch.equal(cpp_store.rank[:, mine], store.rank[:, mine])
        assert torch.equal(cpp_store.buffer[:, mine].nan_to_num(), store.buffer[:, mine].nan_to_num())
        case.layers = layers
    counted = [COUNTERS.index(name) for name in ("recomputes", "merges", "plain", "group_reads", "pages_read")]
    counts = case.layers.table.counts
    assert (counts[:, LAYER].sum(0)[counted] > 0).all(), "every branch must be taken"
    assert not counts[:, 1 - LAYER].any() and not counts[case.slots[~case.recalls]].any()
    assert tied <= 0.1 * steps * len(case.slots), tied


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"), [(torch.float32, 7, 64), (torch.bfloat16, 2, 80), (torch.float32, 1, 128)]
)
def test_equals_the_reference_with_a_rest(
    dtype: torch.dtype, group: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.HOW", HOW_WITH_REST)
    compare(Case(dtype, group, head_dim), apart_by=2e-5)  # a rest sums over many more tokens


@pytest.mark.parametrize("operators", [ReferenceSet, CppSet])
@pytest.mark.parametrize(
    "how",
    [
        (2.0, 0.0, None, 1000, 0, "none"), (2.0, 0.0, None, 1000, 64, "none"), (2.0, 0.0, 1.0, 1000, 3, "none"),
        (2.0, 0.0, None, 1000, 0, "v1"), (2.0, 0.0, None, 1000, 64, "v2"),
    ],
)  # fmt: skip
def test_every_page_at_every_step_is_full_attention(
    operators: type[OperatorSet], how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k = all pages, eps = 0, no look gate: the kept tokens' state merged with that over all evicted tokens."""
    monkeypatch.setattr(f"{__name__}.HOW", (how,) * len(HOW))
    case = Case(torch.float32, 3, 64, refused=False)
    for _ in range(3):
        case.turn()
        kept = case.kept
        out, case.layers = case.step(operators)
        tables = case.layers.tables
        for row in torch.nonzero(case.recalls).flatten().tolist():
            slot = case.slots[row]
            stored = int(tables.recall.stored[slot])
            blocks = tables.sequences.swap_blocks[slot, : swap_blocks_for(stored)].expand(2, -1)
            keys, values = case.layers.pool.read(LAYER, blocks, torch.arange(2))
            keys, values = (x[:, :stored].double() for x in (keys, values))
            logits = case.queries[row].view(2, 3, 64).double() @ keys.transpose(1, 2) * SCALE
            evicted = AttentionState(logits.softmax(-1) @ values, logits.logsumexp(-1))
            expected = merge_states(AttentionState(kept.out[row].double(), kept.lse[row].double()), evicted).out.float()
            torch.testing.assert_close(out[row].view(2, 3, 64), expected, rtol=1e-5, atol=3e-6)


def test_threads_share_the_rows() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        compare(Case(torch.float32, 2, 64, kv_heads=3), steps=3)
    finally:
        torch.set_num_threads(threads)


def test_without_vector_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the compiler makes for the baseline CPU, where levels are selected instead of looked up."""
    for source in build.SOURCES.glob("*.[ch]*"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "TARGETS", ((),))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *(flag for flag in build.FLAGS if flag != "-O3")))
    built = library.checked(ctypes.CDLL(str(build.library(tmp_path))))
    monkeypatch.setattr(library, "load", lambda: built)
    compare(Case(torch.float32, 4, 64), steps=2)
