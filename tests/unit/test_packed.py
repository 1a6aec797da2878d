"""vLLM's packed CPU cache: offsets are probed right for every kernel family this machine can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_calidrop.ops.packed import PackedCache, block_offsets

AMX = torch.cpu._is_amx_tile_supported()
# What vLLM itself chooses for a dtype, block size and head_dim; the test below holds it to that.
LAYOUTS = [
    ("vec", torch.float32, 32),
    ("vec", torch.float32, 128),
    ("vec", torch.float16, 32),
    ("vec", torch.bfloat16, 32),
    ("vec16", torch.float32, 16),
    ("vec16", torch.bfloat16, 16),
    ("vec16", torch.bfloat16, 32),
    ("vec16", torch.float16, 128),
    pytest.param("amx", torch.bfloat16, 32, marks=pytest.mark.skipif(not AMX, reason="no AMX")),
    pytest.param("amx", torch.bfloat16, 128, marks=pytest.mark.skipif(not AMX, reason="no AMX")),
]
HEAD_DIMS = [32, 64, 80, 128]
BLOCKS, KV_HEADS = 5, 2


def supported(isa: str, head_dim: int) -> bool:
    """Head dimensions that are no multiple of 32 go to vec16 (`_get_attn_isa`)."""
    return isa == "vec16" or head_dim % 32 == 0


CASES = pytest.mark.parametrize(
    ("isa", "dtype", "block_size", "head_dim"),
    [
        pytest.param(*getattr(layout, "values", layout), head_dim, marks=getattr(layout, "marks", ()))
        for layout in LAYOUTS
        for head_dim in HEAD_DIMS
        if supported(getattr(layout, "values", layout)[0], head_dim)
    ],
)


def empty_cache(block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Never written memory may hold anything."""
    return torch.full((BLOCKS, KV_HEADS, block_size, 2 * head_dim), float("nan"), dtype=dtype)


def random_kv(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn((2, tokens, KV_HEADS, head_dim), generator=generator).to(dtype)
    return keys.contiguous(), values.contiguous()


def write_as_vllm_does(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor, isa: str) -> None:
    blocks, heads, block_size, width = cache.shape
    halves = cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)


@CASES
def test_reads_what_vllm_wrote(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Whole blocks in scattered order, for every element; a table may name a block twice."""
    packed = PackedCache(cache := empty_cache(block_size, head_dim, dtype), isa)
    keys, values = random_kv(3 * block_size, head_dim, dtype)
    blocks = torch.tensor([4, 0, 2])
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    write_as_vllm_does(cache, keys, values, slots, isa)
    tables = torch.tensor([[4, 0, 2], [2, 2, 4]], dtype=torch.int32)
    read_keys, read_values = packed.read(tables)
    assert read_keys.shape == (2, KV_HEADS, 3 * block_size, head_dim)
    in_order = {4: 0, 0: 1, 2: 2}
    for row, table in enumerate(tables.tolist()):
        for column, block in enumerate(table):
            there = slice(column * block_size, (column + 1) * block_size)
            wrote = slice(in_order[block] * block_size, (in_order[block] + 1) * block_size)
            assert torch.equal(read_keys[row, :, there], keys[wrote].transpose(0, 1))
            assert torch.equal(read_values[row, :, there], values[wrote].transpose(0, 1))


@CASES
def test_takes_each_heads_own_tokens(
    isa: str, dtype: torch.dtype, block_size: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is taken at once; never written tokens are NaN, so a wrong place is seen."""
    monkeypatch.setattr("vllm_calidrop.ops.packed._TAKEN_AT_ONCE", 7)
    tensor, blocks = empty_cache(block_size, head_dim, dtype), torch.tensor([3, 1, 4], dtype=torch.int32)
    tokens = 2 * block_size + 5
    keys, values = random_kv(tokens, head_dim, dtype)
    position = torch.arange(tokens)
    slots = blocks[position // block_size].long() * block_size + position % block_size
    write_as_vllm_does(tensor, keys, values, slots, isa)
    index = torch.stack([torch.randperm(tokens)[: block_size + 3].sort().values for _ in range(KV_HEADS)])
    taken = PackedCache(tensor, isa).take(blocks, index)
    for found, written in zip(taken, (keys, values), strict=True):
        assert torch.equal(found, torch.stack([written[index[head], head] for head in range(KV_HEADS)]))


@CASES
def test_puts_tokens_beside_others(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Compaction overwrites some slots of a sequence's blocks; the slots around them keep what they hold."""
    packed = PackedCache(cache := empty_cache(block_size, head_dim, dtype), isa)
    keys, values = random_kv(BLOCKS * block_size, head_dim, dtype)
    write_as_vllm_does(cache, keys, values, torch.arange(BLOCKS * block_size), isa)
    blocks, first = torch.tensor([2, 4, 0], dtype=torch.int32), block_size - 3
    new_keys, new_values = random_kv(block_size + 7, head_dim, dtype)
    packed.put(blocks, first, new_keys.transpose(0, 1), new_values.transpose(0, 1))
    position = first + torch.arange(block_size + 7)
    slots = blocks[position // block_size].long() * block_size + position % block_size
    keys[slots], values[slots] = new_keys, new_values
    read_keys, read_values = packed.read(torch.arange(BLOCKS)[None])
    assert torch.equal(read_keys[0], keys.transpose(0, 1))
    assert torch.equal(read_values[0], values.transpose(0, 1))


@CASES
def test_offsets_are_a_bijection_onto_the_region(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    offsets = block_offsets(isa, block_size, head_dim, dtype)
    assert offsets.key.shape == offsets.value.shape == (block_size, head_dim)
    elements = 2 * block_size * head_dim
    assert sorted([*offsets.key.flatten().tolist(), *offsets.value.flatten().tolist()]) == list(range(elements))


@CASES
def test_vllm_would_choose_this_family(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """On this machine or on one without AMX; vec16 also serves what the others could."""
    chosen = _get_attn_isa(dtype, block_size, head_dim)
    assert chosen == isa or (chosen in ("amx", "vec") and isa in ("vec", "vec16"))


@pytest.mark.skipif(not AMX, reason="the families differ where AMX is one of them")
def test_the_families_lay_out_differently() -> None:
    """So that reading with the wrong family's offsets could not pass the tests above by luck."""
    vec, amx = (block_offsets(isa, 32, 64, torch.bfloat16) for isa in ("vec", "amx"))
    assert not torch.equal(vec.key, amx.key)
    assert not torch.equal(vec.value, amx.value)


def test_a_layout_that_is_no_bijection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a kernel one day writes elsewhere, or twice, reading would be silently wrong."""
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", lambda *args: None)
    with pytest.raises(RuntimeError, match=r"'vec'.*block 32, head_dim 48"):
        block_offsets("vec", 32, 48, torch.float32)
