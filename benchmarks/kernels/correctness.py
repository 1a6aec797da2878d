"""Every kernel against float64 on the host: decode steps of every shape and layout, scores, compaction."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernels.cases import (
    LAYER,
    ROWS,
    Row,
    Shape,
    assert_same,
    attend_in_float64,
    dirty_scratch,
    make,
    moved_to,
    run,
)
from benchmarks.kernels.prompts import Prompt
from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.evicted.layout import PAGE_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.ops import triton as ops
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.worker.state_table import StateTable

# Weights are rounded to the cache's dtype before they meet the values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LONG = [Row(end, start, stored, gate=gate) for end, start, stored, gate in (
    (1300, 20, 5000, Gate.GROUP), (257, 1, 130, Gate.HEAD), (4096, 4000, 8191, Gate.GROUP_MEAN), (2000, 1999, 1, 0),
)] + [Row(3000, plain=True), Row(0)]  # fmt: skip
# Everybody reads, or as many as the read budget lets.
CODED = [
    Row(300, 20, stored, theta1=2.0, codec=codec, most_reads=most)
    for codec in list(CODECS)[1:]
    for stored, most in ((8191, None), (81, 1))
]
TOY_SHAPES = [Shape(head_dim=32), Shape(kv_heads=1, group=2, layout="cuda-heads", dtype=torch.float16)]
SHAPES = [
    Shape(kv_heads, group, head_dim, block_size, dtype, layout)
    for dtype in TOLERANCE
    for kv_heads, group, head_dim, block_size, layout in (
        (8, 4, 128, 16, "cuda-tokens"), (8, 4, 128, 16, "cuda-heads"), (4, 1, 64, 32, "cuda-tokens"),
        (3, 5, 96, 48, "cuda-heads"), (2, 16, 128, 128, "cuda-tokens"), (2, 7, 256, 16, "cuda-tokens"),
        (2, 3, 80, 16, "cpu-vec"),
    )
]  # fmt: skip


def check_all(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """One record for each kernel and shape: what was compared, and what was wrong ("" if nothing)."""
    checks = {
        "decode step": check_decode, "decode step, codecs": check_codecs, "scores": check_scores,
        "compaction": check_compaction,
    }  # fmt: skip
    if importlib.util.find_spec("xformers") is not None:
        checks["decode step, xFormers"] = check_xformers
    for shape in TOY_SHAPES if toy else SHAPES:
        for name, check in checks.items():
            try:
                check(shape, device, toy)
                wrong = ""
            except AssertionError as error:
                wrong = str(error)
            yield {"kernel": name, **shape._asdict(), "dtype": str(shape.dtype), "wrong": wrong}


def check_decode(shape: Shape, device: torch.device, toy: bool) -> None:
    tolerance = TOLERANCE[shape.dtype]
    for rows in [ROWS[:4]] if toy else [ROWS, LONG]:
        for splits in (1, 2) if toy else (1, 4, 32):
            case = make(shape, rows)
            assert_same(case, run(case.to(device), splits), tolerance, tolerance, attend_in_float64)


def check_codecs(shape: Shape, device: torch.device, toy: bool) -> None:
    tolerance = max(1e-4, TOLERANCE[shape.dtype])  # queries and weights count to 16 bits
    case = make(shape, [CODED[1], CODED[7]] if toy else CODED)
    assert_same(case, run(case.to(device), 2 if toy else 8), tolerance, tolerance, attend_in_float64)


def check_xformers(shape: Shape, device: torch.device, toy: bool) -> None:
    """Where xFormers can serve the shape; other shapes have nothing to be wrong in."""
    from vllm_calidrop.ops import xformers

    tolerance = TOLERANCE[shape.dtype]
    for rows in [ROWS[:4]] if toy else [ROWS, LONG]:
        case = make(shape, rows).finite()
        model = ModelKV(shape.dtype, shape.kv_heads, shape.group, shape.head_dim, shape.block_size, isa=None)
        if toy or (xformers.XformersSet.refusal(model) is None and xformers.can_read(case.cache)):
            found = run(case.to(device), 2 if toy else 8, xformers.decode_step)
            assert_same(case, found, tolerance, tolerance, attend_in_float64)


def check_scores(shape: Shape, device: torch.device, toy: bool) -> None:
    first, count = (20, 9) if toy else (3000, 600)
    prompt = Prompt(shape, first + count)
    queries = prompt.queries(count)
    sums = torch.zeros((shape.kv_heads, first + count), device=device)
    scratch = torch.empty(ops.score_scratch_elements(count, shape.kv_heads, shape.group), device=device)
    cache, blocks = moved_to(prompt.cache, device), prompt.blocks.to(device)
    ops.add_column_sums(sums, queries.to(device), cache, blocks, first, prompt.scale, scratch)
    grouped = queries.double().unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0, 3)
    logits = grouped @ prompt.keys.double().transpose(1, 2)[:, None] * prompt.scale
    position = torch.arange(first + count)
    logits = logits.masked_fill(position > position[first:, None], -torch.inf)
    expected = logits.softmax(-1).sum(2).mean(1).float()
    torch.testing.assert_close(sums.cpu(), expected, rtol=2e-4, atol=2e-5)


def check_compaction(shape: Shape, device: torch.device, toy: bool) -> None:
    tokens, budget = (150, 20) if toy else (3000, 512)
    prompt = Prompt(shape, tokens)
    kept, evicted = prompt.choose(budget)
    count = evicted.shape[1]
    query = prompt.queries(1)[0]
    width = swap_blocks_for(count)
    expected = SwapPool(1, width, shape.kv_heads, shape.head_dim, shape.dtype)
    index = evicted.unsqueeze(-1).expand(-1, -1, shape.head_dim)
    keys, values = prompt.keys.gather(1, index), prompt.values.gather(1, index)
    expected.write(0, tuple(range(width)), keys, values)
    heads = (shape.kv_heads, shape.group, shape.head_dim)
    state = StateTable(LAYER + 1, 2, *heads, shape.dtype, device).layers[LAYER]

    cache, blocks = moved_to(prompt.cache, device), prompt.blocks.to(device)
    pages = torch.zeros_like(expected.pages[0], device=device)
    ops.copy_evicted(cache, blocks, evicted.to(device), pages, torch.arange(width, device=device))
    scratch = dirty_scratch(1, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim, 2 if toy else 16, device)
    ops.calibrate(query.to(device), cache, blocks, evicted.to(device), state, 1, scratch, prompt.scale)
    moved = torch.empty((2, shape.kv_heads, budget, shape.head_dim), dtype=shape.dtype, device=device)
    ops.gather_kept(cache, blocks, kept.to(device), moved)
    ops.scatter_kept(cache, blocks, tokens - budget, moved)

    whole = count // PAGE_TOKENS
    found = pages.cpu().transpose(1, 2).flatten(0, 1)[:whole]
    assert torch.equal(found, expected.pages[0].transpose(1, 2).flatten(0, 1)[:whole]), "evicted pages differ"
    fresh = attend_in_float64(query.view(shape.kv_heads, shape.group, -1), keys, values, prompt.scale)
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(state.out[1].cpu(), fresh.out.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.lse[1].cpu(), fresh.lse.float(), atol=tolerance, rtol=tolerance)
    index = kept.unsqueeze(-1).expand(-1, -1, shape.head_dim)
    for view, source in zip(cache, (prompt.keys, prompt.values)):
        read = prompt.read(view.cpu(), tokens - budget, tokens)
        assert torch.equal(read, source.gather(1, index)), "kept tokens differ"
