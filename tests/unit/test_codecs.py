"""Codecs: bytes counted, errors bounded on keys made to hurt, pages read alone, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.codecs import stored_as
from vllm_calidrop.algorithm.calibration import attention_state
from vllm_calidrop.evicted.codecs import (
    CODECS,
    Codec,
    GroupedCodec,
    Layout,
    NoCodec,
    codec_of,
    has_kernel_layout,
    number_of,
)
from vllm_calidrop.evicted.codecs.grouped import NOWHERE, bfloat16_above, bfloat16_below
from vllm_calidrop.evicted.codecs.integer import Int8
from vllm_calidrop.evicted.codecs.outliers import outlier_tokens
from vllm_calidrop.evicted.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS

QUANTISED = list(CODECS)[1:]
WITH_OUTLIERS = ("fp8", "int8", "int4", "int2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, HEAD_DIM, TOKENS = 2, 128, 900
SCALE = HEAD_DIM**-0.5


def decoded(codec: Codec, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    heads, tokens, head_dim = keys.shape
    k, v = codec.decode(codec.encode(keys, values).blocks.flatten(0, 1))
    return k.reshape(heads, -1, head_dim)[:, :tokens].float(), v.reshape(heads, -1, head_dim)[:, :tokens].float()


def plain_keys(dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn((HEADS, tokens, HEAD_DIM), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", QUANTISED)
def test_equals_the_reference(name: str) -> None:
    """Written apart (tests/reference): but for a code in ten thousand on an edge that rounding decides."""
    torch.manual_seed(3)
    keys = torch.randn((1, 300, 64)) * torch.rand(64) * 4 + torch.randn(64)
    values = torch.randn((1, 300, 64))
    found = torch.stack(decoded(codec_of(name, 64, torch.float32), keys, values))[:, 0]
    wanted = torch.stack(stored_as(name, keys[0], values[0]))
    differs = ~torch.isclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert differs.float().mean() <= 1e-4, differs.sum()


def one_outlier_channel() -> Tensor:
    keys = plain_keys()
    keys[..., 5] = 40 + keys[..., 5]
    return keys


def outlier_tokens_in_outlier_channels() -> Tensor:
    """Some channels far from zero in the same place, but for one token in seventy: unusually small there, or large."""
    keys = plain_keys()
    keys[..., 8:24] += 100
    keys[:, 45::144, 8:24] = -60
    keys[:, 117::144, 8:24] = 150
    return keys


def long_tokens() -> Tensor:
    """A few tokens, an attention sink's like, many times as long as the others in every channel."""
    keys = plain_keys()
    keys[:, 30::97] *= 50
    return keys


def constant_rows() -> Tensor:
    keys = plain_keys()
    keys[0] = 3.7
    keys[1, :, ::2] = torch.arange(HEAD_DIM // 2).to(keys.dtype)
    return keys


def extremes() -> Tensor:
    keys = plain_keys(torch.float16)
    keys[:, 10] = 65504
    keys[:, 20] = -65504
    keys[:, 30:40] = 6e-8
    return keys


ADVERSARIAL: tuple[Callable[[], Tensor], ...] = (
    one_outlier_channel, outlier_tokens_in_outlier_channels, long_tokens, constant_rows, extremes, plain_keys,
)  # fmt: skip


# bytes


def test_bytes_at_head_dim_128() -> None:
    """Against bf16, as read and as the pool's blocks hold it: positions, offsets, scales and outlier tokens counted."""
    least = {"int2": 6.0, "int4": 3.4, "int8": 1.85, "fp8": 1.85}
    for name, factor in least.items():
        codec = codec_of(name, 128, torch.bfloat16)
        assert 512 / codec.bytes_per_token(8192) >= factor
        assert codec.tokens_per_block / SWAP_BLOCK_TOKENS >= factor
    assert codec_of("none", 128, torch.bfloat16).bytes_per_token(1000) == 512


@given(
    st.sampled_from(list(CODECS)),
    st.sampled_from([4, 16, 64, 80, 128, 256]),
    st.sampled_from(DTYPES),
    st.integers(1, 4000),
)
def test_sizes_are_consistent(name: str, head_dim: int, dtype: torch.dtype, tokens: int) -> None:
    codec = codec_of(name, head_dim, dtype)
    assert codec.tokens_per_block % PAGE_TOKENS == 0 and codec.tokens_per_block > 0
    assert codec.block_bytes == codec_of("none", head_dim, dtype).block_bytes
    assert (codec.blocks_for(tokens) - 1) * codec.tokens_per_block < tokens
    assert tokens <= codec.blocks_for(tokens) * codec.tokens_per_block
    assert codec.run_bytes(tokens) <= codec.blocks_for(tokens) * codec.block_bytes
    assert codec.run_bytes(tokens) < codec.run_bytes(tokens + PAGE_TOKENS)
    assert codec.run_bytes(1) <= codec.page_read_bytes
    if isinstance(codec, GroupedCodec):
        assert codec.outliers <= NOWHERE and codec.group_tokens <= NOWHERE


def test_registry() -> None:
    assert next(iter(CODECS)) == "none" and number_of("none") == 0
    assert all(codec.name == name for name, codec in CODECS.items())
    assert {f"{name}_plain" for name in WITH_OUTLIERS} | {"none", *WITH_OUTLIERS} == set(CODECS)


# what comes back


LENGTHS = st.one_of(st.integers(1, 40), st.integers(1, 2000))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CODECS)), st.sampled_from(DTYPES), LENGTHS, st.sampled_from([16, 64, 80]), st.integers(0, 99)
)
def test_pages_alone_are_those_of_the_whole(
    name: str, dtype: torch.dtype, tokens: int, head_dim: int, seed: int
) -> None:
    """Also: nothing depends on what lay in the blocks before, and runs of any length come back."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, HEADS, tokens, head_dim), generator=generator).to(dtype)
    codec = codec_of(name, head_dim, dtype)
    encoded = codec.encode(keys, values)
    assert encoded.blocks.shape == (HEADS, codec.blocks_for(tokens), codec.block_bytes)
    whole = torch.stack(decoded(codec, keys, values), dim=1)
    page = torch.arange(-(-tokens // PAGE_TOKENS))
    first = torch.arange(HEADS)[:, None] * encoded.blocks.shape[1] + page // codec.pages_per_block
    pages = codec.decode_pages(
        encoded.blocks.flatten(), (first * codec.block_bytes).flatten(), (page % codec.pages_per_block).repeat(HEADS)
    )
    alone = pages.view(HEADS, -1, 2, PAGE_TOKENS, head_dim).transpose(1, 2).flatten(2, 3)[:, :, :tokens]
    assert torch.equal(alone.float(), whole)
    assert torch.isfinite(whole).all()
    if name == "none":
        assert torch.equal(whole, torch.stack((keys, values), dim=1).float())


def errors_in_ranges(x: Tensor, back: Tensor, dim: int) -> Tensor:
    """Errors as parts of the range along `dim`. Being bfloat16, offset and scale widen it by 2^-7 of its edge."""
    x = x.float()
    width = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True) + x.abs().amax(dim, keepdim=True) * 2**-7
    return (back - x).abs() / (width + 1e-10)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("make", ADVERSARIAL)
def test_errors_are_bounded_by_the_range(name: str, make: Callable[[], Tensor]) -> None:
    """Of a token for values, of a channel over its range for keys: half a step; for int2, which clamps, on the mean."""
    keys = make()
    values = keys.flip(1)
    codec = codec_of(name, HEAD_DIM, keys.dtype)
    assert isinstance(codec, GroupedCodec)
    k, v = decoded(codec, keys, values)
    part = {"fp8": 1 / 32, "int8": 0.5 / 255, "int4": 0.5 / 15, "int2": 0.5 / 3}[name.removesuffix("_plain")]

    def check(errors: Tensor, dim: int, slack: float) -> None:
        worst = errors.square().mean(dim).sqrt() if codec.bits == 2 else errors
        assert worst.max() <= slack * part, float(worst.max() / part)

    check(errors_in_ranges(values, v, -1), -1, 1.02)
    for first in range(0, TOKENS, codec.tokens_per_block):
        tokens = codec.group_tokens // codec.ranges
        for start in range(first, min(first + codec.tokens_per_block, TOKENS), tokens):
            end = min(start + tokens, first + codec.tokens_per_block, TOKENS)
            check(errors_in_ranges(keys[:, start:end], k[:, start:end], 1), 1, 1.5 if codec.fine else 1.02)


def state_error(name: str, keys: Tensor, values: Tensor, queries: Tensor) -> float:
    """Mean relative error of the attention state's output over the run."""
    codec = codec_of(name, HEAD_DIM, keys.dtype)
    exact = attention_state(queries, keys, values, SCALE).out
    out = attention_state(queries, *decoded(codec, keys, values), SCALE).out
    return float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


@pytest.mark.parametrize("make", [outlier_tokens_in_outlier_channels, long_tokens])
def test_outlier_tokens_make_int2_at_least_four_times_better(make: Callable[[], Tensor]) -> None:
    """Error of the attention state: else outliers spoil the ranges they share, or are clamped themselves."""
    queries = torch.randn((HEADS, 16, HEAD_DIM), generator=torch.Generator().manual_seed(2))
    errors = {name: state_error(name, make(), plain_keys(seed=1), queries) for name in ("int2", "int2_plain")}
    assert errors["int2_plain"] >= 4 * errors["int2"], errors


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.03), ("fp8", 0.06), ("int4", 0.2), ("int2", 0.6)])
@pytest.mark.parametrize("make", [one_outlier_channel, outlier_tokens_in_outlier_channels, plain_keys])
def test_attention_state_is_bounded(name: str, bound: float, make: Callable[[], Tensor]) -> None:
    queries = torch.randn((HEADS, 16, HEAD_DIM), generator=torch.Generator().manual_seed(2))
    assert state_error(name, make(), plain_keys(seed=1), queries) <= bound


@pytest.mark.parametrize("name", WITH_OUTLIERS)
def test_outlier_tokens_are_exact(name: str) -> None:
    codec = codec_of(name, HEAD_DIM, torch.bfloat16)
    assert isinstance(codec, GroupedCodec)
    keys, values = plain_keys(), plain_keys(seed=1)
    where = torch.tensor([17, codec.group_tokens + 3, TOKENS - 1])
    keys[:, where] = keys[:, where] * 100
    k, v = decoded(codec, keys, values)
    assert torch.equal(k[:, where], keys[:, where].float()) and torch.equal(v[:, where], values[:, where].float())


def test_outliers_of_a_run_shorter_than_their_number() -> None:
    keys = torch.randn((1, 1, 96, 16))
    exists = torch.arange(96).expand(1, 1, -1) < 1
    assert outlier_tokens(keys, exists, 2)[0, 0, 0] == 0
    assert torch.equal(decoded(codec_of("int2", 16, torch.float32), *[keys[0, :, :1]] * 2)[0], keys[0, :, :1])


def test_outlier_tokens_are_the_farthest_in_the_widest_channels() -> None:
    keys = torch.zeros((1, 96, 16))
    keys[0, :, 3] = 20 + torch.rand(96)
    keys[0, 11, 3], keys[0, 70, 3] = 0, 45
    keys[0, 40] += 5  # far in most channels, but not in those that are wide
    assert set(outlier_tokens(keys, torch.ones((1, 96), dtype=torch.bool), 2)[0].tolist()) == {11, 70}


# what is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("half", [0, 1])
def test_refused(name: str, bad: float, half: int) -> None:
    """The head alone; what is stored for it decodes to zeros, and the other heads are as without it."""
    kv = torch.stack((plain_keys(), plain_keys(seed=1)))
    codec = codec_of(name, HEAD_DIM, kv.dtype)
    whole = decoded(codec, *kv)
    kv[half, 1, 333, 7] = bad
    encoded = codec.encode(*kv)
    assert encoded.refused.tolist() == [False, True]
    for good, after in zip(whole, decoded(codec, *kv)):
        assert torch.equal(good[0], after[0])
        assert not after[1].any()


def test_without_a_codec_nothing_is_refused() -> None:
    keys = plain_keys()
    keys[0, 0, 0] = torch.nan
    encoded = codec_of("none", HEAD_DIM, keys.dtype).encode(keys, keys)
    assert not encoded.refused.any()


@pytest.mark.parametrize("name", QUANTISED)
def test_what_float32_cannot_hold_is_refused(name: str) -> None:
    keys = plain_keys(torch.float32)
    keys[0, 0, 0] = 3e38
    assert codec_of(name, HEAD_DIM, keys.dtype).encode(keys, keys).refused.tolist() == [True, False]


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**90), max_value=2.0**90), min_size=1
    )
)
def test_bfloat16_rounded_outwards(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    below, above = bfloat16_below(x).float(), bfloat16_above(x).float()
    assert (below <= x).all() and (x <= above).all()
    assert ((above - below) <= x.abs() * 2**-7 + 1e-38).all()


# the contract


@pytest.mark.parametrize("name", CODECS)
def test_layouts_of_every_codec_are_right(name: str) -> None:
    for head_dim, dtype in itertools.product((8, 64, 80, 128, 256), DTYPES):
        codec_of(name, head_dim, dtype).check()
    assert has_kernel_layout(name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict.fromkeys(Layout._fields, 0), "no page in a block"),
        ({"pages_per_group": 0}, "pages_per_group 0"),
        ({"pages_per_range": 2}, "ranges of 2 pages"),
        ({"page_bytes": 0}, "page_bytes"),
        ({"bits": 3}, "bits"),
        ({"outliers": 4}, "outliers must be at most 3"),
        ({"head_bytes": 0}, "head_bytes"),
        ({"group_bytes": 16}, "group_bytes"),
        ({"pages_per_block": 70}, "pages_per_block 70, but a block holds 464 tokens"),
        ({"range_bytes": -1}, "negative"),
        (Layout.uncoded(19)._asdict(), "19 pages as they are take"),
    ],
)
def test_a_wrong_layout_is_refused_when_the_codec_is_built(wrong: dict[str, int], said: str) -> None:
    """It would be divided by, or read beyond a block."""

    class Wrong(Int8):
        name = "wrong"

        def kernel_layout(self) -> Layout:
            return super().kernel_layout()._replace(**wrong)

    with pytest.raises(ValueError, match=f"the codec wrong .*{said}"):
        Wrong(128, torch.float32).check()
    CODECS["wrong"] = Wrong
    try:
        with pytest.raises(ValueError, match="the codec wrong"):
            codec_of("wrong", 128, torch.float32)
    finally:
        del CODECS["wrong"]


def test_a_codec_whose_blocks_hold_too_little_is_refused() -> None:
    class Wasteful(NoCodec):
        name = "wasteful"

        @property
        def tokens_per_block(self) -> int:
            return 112

    with pytest.raises(ValueError, match=r"the codec wasteful .*tokens_per_block 112"):
        Wasteful(64, torch.float16).check()
