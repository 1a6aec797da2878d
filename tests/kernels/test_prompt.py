"""What happens to a prompt: its scores, and its compaction, against the torch code of `policies/` and `cache/`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import LAYER, Shape, dirty_scratch
from benchmarks.kernels.prompts import Prompt
from vllm_calidrop.algorithm.calibration import attention_state
from vllm_calidrop.algorithm.policies import h2o
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops.triton import (
    KVCache,
    add_column_sums,
    calibrate,
    copy_evicted,
    gather_kept,
    scatter_kept,
    score,
    score_scratch_elements,
)
from vllm_calidrop.worker.state_table import StateTable

SHAPES = [
    Shape(head_dim=32),
    Shape(kv_heads=1, group=1, head_dim=96, block_size=48, layout="cpu-vec"),
    Shape(kv_heads=2, group=3, head_dim=80, block_size=32, layout="cuda-heads"),
    Shape(kv_heads=1, group=8, head_dim=256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 40), (95, 33), (64, 4)])
def test_column_sums(shape: Shape, first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "PROGRAMS", 8 * shape.kv_heads)
    prompt = Prompt(shape, first + count)
    queries = prompt.queries(count)
    sums = torch.rand((shape.kv_heads, first + count + 5))
    expected = sums.clone()
    h2o.add_column_sums(expected, queries, prompt.keys, first, prompt.scale)
    scratch = torch.full((score_scratch_elements(count, shape.kv_heads, shape.group),), torch.nan)
    add_column_sums(sums, queries, prompt.cache, prompt.blocks, first, prompt.scale, scratch)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_column_sums_chunk_by_chunk() -> None:
    prompt = Prompt(Shape(head_dim=32), 90)
    queries, found = prompt.queries(90), torch.zeros((2, 90))
    expected = torch.zeros((2, 90))
    h2o.add_column_sums(expected, queries, prompt.keys, 0, prompt.scale)
    for first, end in ((0, 1), (1, 50), (50, 90)):
        scratch = torch.full((score_scratch_elements(end - first, 2, 4),), torch.nan)
        add_column_sums(found, queries[first:end], prompt.cache, prompt.blocks, first, prompt.scale, scratch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("tokens", "budget"), [(17, 16), (150, 20), (200, 65)])
def test_compaction_moves_what_was_chosen(shape: Shape, tokens: int, budget: int) -> None:
    prompt = Prompt(shape, tokens)
    kept, evicted = prompt.choose(budget)
    query = prompt.queries(1)[0]
    count = evicted.shape[1]
    width = swap_blocks_for(count)
    pool = SwapPool(2, width + 3, shape.kv_heads, shape.head_dim, shape.dtype)
    expected_pool = SwapPool(2, width + 3, shape.kv_heads, shape.head_dim, shape.dtype)
    pool.pages.fill_(torch.nan)
    expected_pool.pages.fill_(torch.nan)
    swap_blocks = torch.randperm(width + 3)[:width].int()
    table = StateTable(2, 3, shape.kv_heads, shape.group, shape.head_dim, shape.dtype)

    copy_evicted(prompt.cache, prompt.blocks, evicted, pool.pages[LAYER], swap_blocks)
    state = table.layers[LAYER]
    scratch = dirty_scratch(1, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim, splits=3)
    calibrate(query, prompt.cache, prompt.blocks, evicted, state, 1, scratch, prompt.scale)
    moved = torch.full((2, shape.kv_heads, budget, shape.head_dim), torch.nan, dtype=shape.dtype)
    gather_kept(prompt.cache, prompt.blocks, kept, moved)
    scatter_kept(prompt.cache, prompt.blocks, tokens - budget, moved)

    index = evicted.unsqueeze(-1).expand(-1, -1, shape.head_dim)
    keys, values = prompt.keys.gather(1, index), prompt.values.gather(1, index)
    expected_pool.write(LAYER, tuple(swap_blocks.tolist()), keys, values)
    written = -(-count // 16)
    for page in range(width * SWAP_BLOCK_TOKENS // 16):
        block, within = swap_blocks[page // 8], page % 8
        found = pool.pages[LAYER, block, :, within]
        if page < written:
            assert torch.equal(found, expected_pool.pages[LAYER, block, :, within]), page
        else:
            assert found.isnan().all(), page
    assert pool.pages[0].isnan().all()

    expected = attention_state(query.view(shape.kv_heads, shape.group, -1), keys, values, prompt.scale)
    torch.testing.assert_close(table.out[LAYER, 1], expected.out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(table.lse[LAYER, 1], expected.lse, rtol=1e-5, atol=2e-6)
    assert torch.equal(table.query[LAYER, 1].flatten(0, 1), query)
    assert not table.out[0].any() and not table.out[LAYER, [0, 2]].any()

    index = kept.unsqueeze(-1).expand(-1, -1, shape.head_dim)
    for cache, source in zip(prompt.cache, (prompt.keys, prompt.values)):
        assert torch.equal(prompt.read(cache, tokens - budget, tokens), source.gather(1, index))
        assert torch.equal(prompt.read(cache, 0, tokens - budget), source[:, : tokens - budget])
    untouched = sorted(
        set(range(len(prompt.cache.key))) - set(prompt.blocks[: -(-tokens // shape.block_size)].tolist())
    )
    assert all(cache[untouched].isnan().all() for cache in prompt.cache)


def test_calibration_over_nothing() -> None:
    shape = Shape(head_dim=32)
    prompt = Prompt(shape, 20)
    table = StateTable(2, 1, shape.kv_heads, shape.group, shape.head_dim, shape.dtype)
    table.lse.zero_()
    scratch = dirty_scratch(1, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim, splits=2)
    state = table.layers[LAYER]
    nothing = torch.empty((shape.kv_heads, 0), dtype=torch.int64)
    calibrate(prompt.queries(1)[0], prompt.cache, prompt.blocks, nothing, state, 0, scratch, prompt.scale)
    assert (table.lse[LAYER] == -torch.inf).all() and not table.out[LAYER].any()


def test_bfloat16_copies_are_exact() -> None:
    shape = Shape(head_dim=64, dtype=torch.bfloat16)
    prompt = Prompt(shape, 40)
    kept, _ = prompt.choose(24)
    moved = torch.empty((2, shape.kv_heads, 24, shape.head_dim), dtype=shape.dtype)
    gather_kept(KVCache(*prompt.cache), prompt.blocks, kept, moved)
    assert torch.equal(moved[0], prompt.keys.gather(1, kept.unsqueeze(-1).expand(-1, -1, 64)))
