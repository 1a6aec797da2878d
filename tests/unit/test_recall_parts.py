"""Sketch, looks and buffer on their own, against what they claim."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.recall import BOUNDARY, _code_and_scale, _quantise, _rotate, _unrotate
from vllm_calidrop.evicted.recall.buffer import EMPTY, OLDEST, is_held, renew
from vllm_calidrop.evicted.recall.looks import page_shares, wanted_pages
from vllm_calidrop.evicted.recall.sketch import decoded, encode, estimate, padded_dim, rotation, token_bytes


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_dim", [1, 8, 64, 80, 96, 128, 256])
def test_rotation_keeps_dot_products(head_dim: int) -> None:
    rot = rotation(head_dim)
    assert rot.shape == (padded_dim(head_dim), head_dim)
    torch.testing.assert_close(rot.T @ rot, torch.eye(head_dim), atol=1e-5, rtol=0)


# Two ways to rotate a key differ by units in the last place: what lies nearer to an edge of rounding may go either way.
NEAR = 2e-6


def ties_of(rotated: Tensor) -> tuple[Tensor, bool]:
    """Of a key, float64 [D']: channels at the quantiser's edges, bool [D']; is its scale between two float16."""
    u = (rotated / rotated.norm() * math.sqrt(len(rotated))).abs()
    scale = _code_and_scale(rotated)[1]
    return (u < NEAR) | ((u - BOUNDARY).abs() < NEAR), bool((scale * (1 - NEAR)).half() != (scale * (1 + NEAR)).half())


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_two_implementations_of_the_sketch_agree(head_dim: int) -> None:
    """Codes and scales bit by bit, but for ties: those are counted, few, and only the tied part may differ."""
    keys, mu = 3 * sample(2, 400, head_dim), sample(2, head_dim, seed=1)
    keys[0, 3] = mu[0]
    query = sample(2, 3, head_dim, seed=2)
    codes, scales = encode(keys, mu)
    assert codes.shape == (2, 400, padded_dim(head_dim) // 4) and scales.dtype == torch.float16
    assert scales[0, 3] == 0
    estimates, ties = estimate(query, codes, scales, mu), []
    for head, token in itertools.product(range(2), range(400)):
        if (head, token) == (0, 3):
            continue
        rotated = _rotate(keys[head, token : token + 1].double() - mu[head].double())[0]
        code, scale = _code_and_scale(rotated)
        tied_channels, tied_scale = ties_of(rotated)
        same = decoded(codes[head, token]) == code.float()
        assert (same | tied_channels).all(), (head, token)
        if tied_scale or tied_channels.any():
            ties.append((head, token))
        if same.all():
            apart = scales[head, token].view(torch.int16) - scale.half().view(torch.int16)
            assert apart.abs() <= int(tied_scale), (head, token)
        if same.all() and apart == 0:
            again = mu[head] + _unrotate(_quantise(rotated[None]))[0, :head_dim].float()
            torch.testing.assert_close(estimates[head, :, token], query[head] @ again, atol=1e-4, rtol=1e-4)
    assert len(ties) <= 0.02 * 2 * 400, ties


def test_every_byte_decodes_to_its_four_channels() -> None:
    levels = {0: -0.4528, 1: -1.5104, 2: 0.4528, 3: 1.5104}
    found = decoded(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))
    for byte in range(256):
        torch.testing.assert_close(found[byte], torch.tensor([levels[byte >> 2 * i & 3] for i in range(4)]))


@pytest.mark.parametrize("outliers", [False, True])
def test_estimates_are_unbiased_and_close(outliers: bool) -> None:
    """Error of q . k: nearly no bias, and about 0.35 |q| |k - mu| / sqrt(d): two bits per channel of rounding noise."""
    keys = sample(1, 4000, 128)
    if outliers:
        keys[..., 5] += 30
        keys[..., 77] *= 20
    mu = keys.mean(1)
    query = sample(1, 16, 128, seed=1)
    error = estimate(query, *encode(keys, mu), mu) - query @ keys.transpose(1, 2)
    unit = query.norm(dim=-1)[..., None] * (keys - mu.unsqueeze(1)).norm(dim=-1)[:, None] / math.sqrt(128)
    assert (error / unit).mean().abs() < 0.01
    assert (error / unit).std() < 0.45


def test_token_bytes_are_those_of_the_design() -> None:
    assert (token_bytes(64), token_bytes(128)) == (18, 34)


def test_page_shares_are_softmax_masses() -> None:
    logits, kept = 3 * sample(2, 3, 48), sample(2, 3, 7, seed=1)
    shares = page_shares(logits, torch.tensor([48, 37]), kept.logsumexp(-1))
    logits[1, :, 37:] = -torch.inf
    every = torch.cat((kept, logits), -1).softmax(-1)[..., 7:]
    torch.testing.assert_close(shares, every.unflatten(-1, (3, 16)).sum(-1))


def wanted(shares: list[list[float]], eps: float = 0.02, top_p: float = math.nan, most: int = 4) -> list[int]:
    pages = wanted_pages(torch.tensor([shares]), torch.tensor([eps]), torch.tensor([top_p]), torch.tensor([most]))
    return pages[0].tolist()


def test_top_k_above_eps() -> None:
    assert wanted([[0.1, 0.5, 0.02, 0.03, 0.2]], most=3) == [1, 4, 0]
    assert wanted([[0.1, 0.5, 0.02, 0.03, 0.2]], most=9) == [1, 4, 0, 3]
    assert wanted([[0.1, 0.1, 0.0]], most=1) == [0]
    assert wanted([[0.0, 0.25], [0.5, 0.0]]) == [0, 1]
    assert wanted([[0.01, 0.02]]) == []
    assert wanted([[0.0, 1e-30]], eps=0.0) == [1]


def test_top_p_leaves_at_most_the_rest_unread() -> None:
    assert wanted([[0.1, 0.5, 0.02, 0.03, 0.2]], top_p=0.9) == [1, 4, 0]
    assert wanted([[0.1, 0.5, 0.02, 0.03, 0.2]], top_p=0.9, most=2) == [1, 4]
    assert wanted([[0.04, 0.05]], top_p=0.9) == []
    assert wanted([[0.3, 0.0, 0.0], [0.0, 0.08, 0.08]], top_p=0.9) == [0, 1]
    assert wanted([[0.3, 0.0, 0.2]], top_p=1.0) == [0, 2]


def test_rows_of_different_choices_share_a_batch() -> None:
    shares = torch.tensor([[[0.1, 0.5, 0.02, 0.03, 0.2]]]).repeat(3, 1, 1)
    found = wanted_pages(
        shares, torch.tensor([0.15, 0.9, 0.0]), torch.tensor([math.nan, math.nan, 0.97]), torch.tensor([4, 4, 9])
    )
    assert found.tolist() == [[1, 4, -1, -1], [-1] * 4, [1, 4, 0, 3]]


looks = st.lists(st.lists(st.integers(0, 11), unique=True, max_size=6), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(looks, min_size=1, max_size=4), st.integers(1, 6), st.data())
def test_buffer_holds_the_newest_wanted_pages(rows: list[list[list[int]]], places: int, data: st.DataObject) -> None:
    """Several rows at once, each with its own size, against a list per row; every page is found where it was put."""
    sizes = [data.draw(st.integers(0, places)) for _ in rows]
    held = torch.full((len(rows), places), EMPTY)
    rank = torch.full((len(rows), places), OLDEST)
    lists: list[list[int]] = [[] for _ in rows]
    content: list[dict[int, int]] = [{} for _ in rows]
    for step in range(max(map(len, rows))):
        now = [row[step] if step < len(row) else [] for row in rows]
        pages = torch.full((len(rows), max(map(len, now))), -1)
        for i, want in enumerate(now):
            pages[i, : len(want)] = torch.tensor(want, dtype=torch.int64)
        known = is_held(pages, held)
        assert known.tolist() == [
            [i < len(want) and want[i] in old for i in range(pages.shape[1])] for want, old in zip(now, lists)
        ]
        renewal = renew(held, rank, pages, torch.tensor(sizes))
        held, rank = renewal.held, renewal.rank
        for i, want in enumerate(now):
            lists[i] = (want + [page for page in lists[i] if page not in want])[: sizes[i]]
            for page, place in zip(pages[i].tolist(), renewal.place[i].tolist()):
                if place >= 0:
                    content[i][place] = page
            by_age = [held[i, j].item() for j in rank[i].argsort() if held[i, j] >= 0]
            assert by_age == lists[i]
            assert all(content[i][j] == held[i, j] for j in range(places) if held[i, j] >= 0)
