"""Recall by pages in C++ against torch: pages, states, buffers and counters, step by step."""

from __future__ import annotations

import copy
import ctypes
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, cosine, merge_states
from vllm_calidrop.evicted.layout import pages_for, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.looks import page_shares
from vllm_calidrop.evicted.recall.sketch import estimate
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.choice import RecallOp
from vllm_calidrop.ops.cpp import build
from vllm_calidrop.ops.cpp import recall as in_native
from vllm_calidrop.ops.reference import recall as in_torch
from vllm_calidrop.records import COUNTERS, RecallRecord, SequenceRecord
from vllm_calidrop.worker.sequences import SequenceTable
from vllm_calidrop.worker.state_table import StateTable

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

LAYERS, LAYER, SCALE = 2, 1, 0.25
NEAR = 2e-5  # relative: nearer shares are not told apart by two ways to add up

How = tuple[float, float, float | None, int, int]  # theta, eps, top_p, most, buffer places
HOW: tuple[How, ...] = (
    (0.9, 0.02, None, 4, 0),
    (0.9, 0.05, None, 4, 4),
    (0.5, 0.0, None, 1000, 0),
    (2.0, 0.001, None, 3, 2),
    (2.0, 0.0, 0.9, 64, 0),
    (0.8, 0.0, 0.7, 5, 7),
    (2.0, 0.0, 1.0, 1000, 64),
    (-2.0, 0.95, None, 2, 1),
)
STORED = (1, 16, 17, 100, 128, 129, 700, 1311)


def record_of(row: int, slot: int, blocks: list[int], buffer_ids: list[int], stored: int) -> SequenceRecord:
    theta, eps, top_p, most, _ = HOW[row % len(HOW)]
    recall = RecallRecord(theta, eps, top_p, most, tuple(blocks), tuple(buffer_ids))
    return SequenceRecord(
        request_id=str(row), admission=row, slot=slot, prompt_len=stored + 64, compaction_point=stored + 64, budget=64,
        first_block=0, view_start=0, policy="snapkv", window=32, sinks=0, pool_kernel=5, theta1=0.7, theta2=0.85,
        gate=0, stored=stored, swap_blocks=tuple(blocks[::-1]), recall=recall,
    )  # fmt: skip


class Case:
    """Rows of all lengths and settings; whatever is nobody's is NaN, or the largest code."""

    def __init__(self, dtype: torch.dtype, group: int, head_dim: int, kv_heads: int = 2, refused: bool = True) -> None:
        torch.manual_seed(0)
        rows = 2 * len(HOW)
        stored = [STORED[(row + row // len(HOW)) % len(STORED)] for row in range(rows)]
        total = sum(map(swap_blocks_for, stored))
        blocks, places = torch.randperm(total).tolist(), torch.randperm(sum(how[-1] for how in HOW) * 2).tolist()
        slots = torch.randperm(rows + 3)[:rows].tolist()
        self.group, self.shape = group, (kv_heads, group, head_dim)
        self.pool = SwapPool(LAYERS, total, kv_heads, head_dim, dtype)
        self.pool.pages.fill_(torch.nan)
        self.table = StateTable(LAYERS, rows + 3, kv_heads, group, head_dim, dtype)
        self.store = RecallStore(LAYERS, rows + 3, total, len(places), kv_heads, head_dim, dtype)
        self.store.codes.fill_(255)
        self.store.scales.fill_(torch.nan)
        self.store.buffer.fill_(torch.nan)
        sequences = SequenceTable(rows + 3, 2048)
        for row, tokens in enumerate(stored):
            mine = [blocks.pop() for _ in range(swap_blocks_for(tokens))]
            record = record_of(row, slots[row], mine, [places.pop() for _ in range(HOW[row % len(HOW)][-1])], tokens)
            sequences._admit(record)
            self.store.admit(record)
            keys, values = torch.randn((2, kv_heads, tokens, head_dim))
            keys = (1.5 * keys + torch.randn((kv_heads, 1, head_dim))).to(dtype)
            self.pool.write(LAYER, torch.tensor(record.swap_blocks), keys, values.to(dtype))
            self.store.put_sketch(LAYER, record, keys, keys)
        if refused:  # the codec found NaN in what this row's first KV head evicted
            self.store.refuse(LAYER, slots[3], torch.arange(kv_heads) == 0)
            self.table.refuse(LAYER, slots[3], torch.arange(kv_heads) == 0)
        self.where = torch.randperm(rows + 2)[:rows]  # some of the step's rows do not recall by pages
        self.sequences, self.slots = sequences, torch.tensor(slots)
        self.queries = torch.randn((rows + 2, kv_heads * group, head_dim))
        self.dtype = dtype

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries that turn a little in some rows and a lot in others; the state over the kept tokens."""
        turn = torch.rand((len(self.queries), 1, 1)) ** 3
        self.queries = torch.lerp(self.queries, torch.randn_like(self.queries) * 1.5, turn)
        out = torch.randn(self.queries.shape)
        return self.queries.to(self.dtype), out, 3 + torch.randn(self.queries.shape[:2])


def ties(case: Case, queries: Tensor, lse: Tensor) -> Tensor:
    """bool [rows]: a look gate, a page or an order that rounding could decide either way."""
    rows = case.sequences.recall_rows(case.where, case.slots)
    grouped = queries[case.where].view(-1, *case.shape)
    rho = cosine(grouped, case.table.query[LAYER, case.slots]).amin(-1)
    found = ((rho - rows.theta[:, None]).abs() < 1e-6).any(-1)
    every_head = torch.arange(case.shape[0])
    for i in range(len(found)):
        blocks = rows.sketch_blocks[i, : swap_blocks_for(int(rows.stored[i]))].expand(len(every_head), -1)
        sketch = case.store.sketch(LAYER, case.slots[i].expand(len(every_head)), blocks, every_head)
        logits = estimate(grouped[i], *sketch) * SCALE
        kept = lse[case.where[i]].view(case.shape[:2])
        shares = page_shares(logits, rows.stored[i].expand(len(every_head)), kept)[
            ..., : pages_for(int(rows.stored[i]))
        ]
        share, order = shares.amax(1).sort(descending=True)
        unread = shares.gather(-1, order.unsqueeze(1).expand_as(shares)).flip(-1).cumsum(-1).amax(1)
        edges = [share[:, :-1] / share[:, 1:] - 1, share / rows.eps[i].clamp_min(1e-30) - 1]
        edges.append(unread / (1 - rows.top_p[i]).clamp_min(1e-30) - 1)
        found[i] |= any(bool((edge.abs() < NEAR).any()) for edge in edges)
    return found


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.float32, 1, 64), (torch.float32, 7, 32), (torch.float32, 2, 80), (torch.bfloat16, 4, 128),
        (torch.float16, 3, 96),
    ],
)  # fmt: skip
def test_equals_torch(dtype: torch.dtype, group: int, head_dim: int) -> None:
    compare(Case(dtype, group, head_dim))


def compare(case: Case, steps: int = 4) -> None:
    """Both take the same steps from the same state; rows at a tie are set aside, and are few."""
    tied = 0
    for _ in range(steps):
        queries, out, lse = case.step()
        apart = ties(case, queries, lse)
        tied += int(apart.sum())
        found = []
        for op in (in_torch.add_recalled, in_native.add_recalled):
            table, store, result = copy.deepcopy(case.table), copy.deepcopy(case.store), out.clone()
            rows = case.sequences.recall_rows(case.where, case.slots)
            op(rows, LAYER, queries, result, lse, case.pool, table, store, SCALE)
            found.append((table, store, result))
        (table, store, result), (native_table, native_store, native_result) = found
        others = torch.ones(len(out), dtype=torch.bool)
        others[case.where] = False
        assert torch.equal(native_result[others], out[others])
        slots = case.slots[~apart]
        close = {"rtol": 1e-5, "atol": 3e-6}
        torch.testing.assert_close(native_result[case.where[~apart]], result[case.where[~apart]], **close)
        assert torch.equal(native_table.counts[slots], table.counts[slots])
        assert torch.equal(native_table.query[:, slots], table.query[:, slots])
        torch.testing.assert_close(native_table.lse[:, slots], table.lse[:, slots], **close)
        stored = table.lse[:, slots] > -math.inf  # the state over nothing has no output
        torch.testing.assert_close(native_table.out[:, slots][stored], table.out[:, slots][stored], **close)
        assert torch.equal(native_store.looked, store.looked)
        ids = case.sequences.recall_rows(case.where[~apart], slots)
        places = [ids.buffer_ids[i, : ids.buffer_size[i]] for i in range(len(slots))]
        mine = torch.cat(places)
        assert torch.equal(native_store.held[:, mine], store.held[:, mine])
        assert torch.equal(native_store.rank[:, mine], store.rank[:, mine])
        assert torch.equal(native_store.buffer[:, mine].nan_to_num(), store.buffer[:, mine].nan_to_num())
        case.table, case.store = table, store
    counted = [COUNTERS.index(name) for name in ("recomputes", "merges", "plain", "group_reads", "pages_read")]
    assert (case.table.counts[:, LAYER].sum(0)[counted] > 0).all(), "every branch must be taken"
    assert not case.table.counts[:, 1 - LAYER].any()
    assert tied <= 0.1 * steps * len(case.where), tied


@pytest.mark.parametrize("op", [in_torch.add_recalled, in_native.add_recalled])
@pytest.mark.parametrize("how", [(2.0, 0.0, None, 1000, 0), (2.0, 0.0, None, 1000, 64), (2.0, 0.0, 1.0, 1000, 3)])
def test_every_page_at_every_step_is_full_attention(op: RecallOp, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    """k = all pages, eps = 0, no look gate: the kept tokens' state merged with that over all evicted tokens."""
    monkeypatch.setattr(f"{__name__}.HOW", (how,) * len(HOW))
    case = Case(torch.float32, 3, 64, refused=False)
    rows = case.sequences.recall_rows(case.where, case.slots)
    for _ in range(3):
        queries, out, lse = case.step()
        kept = AttentionState(out[case.where].view(-1, 2, 3, 64), lse[case.where].view(-1, 2, 3))
        op(rows, LAYER, queries, out, lse, case.pool, case.table, case.store, SCALE)
        for i in range(len(rows.rows)):
            blocks = rows.swap_blocks[i, : swap_blocks_for(int(rows.stored[i]))].expand(2, -1)
            keys, values = case.pool.read(LAYER, blocks, torch.arange(2))
            keys, values = (x[:, : int(rows.stored[i])].double() for x in (keys, values))
            logits = queries[case.where[i]].view(2, 3, 64).double() @ keys.transpose(1, 2) * SCALE
            evicted = AttentionState(logits.softmax(-1) @ values, logits.logsumexp(-1))
            expected = merge_states(AttentionState(kept.out[i].double(), kept.lse[i].double()), evicted).out.float()
            torch.testing.assert_close(out[case.where[i]].view(2, 3, 64), expected, rtol=1e-5, atol=3e-6)


def test_threads_share_the_rows() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        compare(Case(torch.float32, 2, 64, kv_heads=3), steps=3)
    finally:
        torch.set_num_threads(threads)


def test_other_element_types_go_to_torch() -> None:
    case = Case(torch.float32, 2, 24)
    queries, out, lse = case.step()
    results = []
    for op in (in_torch.add_recalled, in_native.add_recalled):
        table, store, result = copy.deepcopy(case.table), copy.deepcopy(case.store), out.clone()
        op(
            case.sequences.recall_rows(case.where, case.slots),
            LAYER,
            queries,
            result,
            lse,
            case.pool,
            table,
            store,
            1.0,
        )
        results.append(result)
    assert torch.equal(*results)


def test_without_vector_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the compiler makes for the baseline CPU, where levels are selected instead of looked up."""
    for source in ("recall.cpp", *(path.name for path in build.SOURCES.glob("*.h"))):
        shutil.copy(build.SOURCES / source, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "TARGETS", ((),))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *(flag for flag in build.FLAGS if flag != "-O3")))
    operator = in_native.operator_of(ctypes.CDLL(str(build.library(tmp_path))))
    monkeypatch.setattr(in_native, "_operator", lambda: operator)
    compare(Case(torch.float32, 4, 64), steps=2)
