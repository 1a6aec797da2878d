"""The balance, what is subtracted for noise, coded values and the rest on their own, against what they claim."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.reference.recall import HeadRecall, _coded_value, _rotate, _unrotate, rest_of
from tests.reference.settings import Settings
from vllm_calidrop.algorithm.calibration import attention_state, merge_states
from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.balance import balance_of
from vllm_calidrop.evicted.recall.looks import page_shares
from vllm_calidrop.evicted.recall.memory import recall_bytes
from vllm_calidrop.evicted.recall.rest import rest_state
from vllm_calidrop.evicted.recall.sketch import encode, estimate, inflation, rotation
from vllm_calidrop.evicted.recall.values import decoded_values, encode_values, value_bytes

SCALE = 0.125


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying(x: Tensor, by: float) -> Tensor:
    """x with one channel that is `by` times the others."""
    return torch.cat((x[..., :1] * by, x[..., 1:]), dim=-1)


def decoded_back(values: Tensor, mu: Tensor, bits: int) -> Tensor:
    """Values [H, T, D] as their codes stand for them."""
    codes, scales = encode_values(values, mu, bits)
    rotated = decoded_values(codes) * scales.float().unsqueeze(-1)
    return (rotated @ rotation(values.shape[-1]))[:, : values.shape[1]] + mu.unsqueeze(1)


def test_balance_makes_both_sides_equally_large() -> None:
    """q / w and w (k - mu) have the same root mean square in every channel, and their dot product is as before."""
    queries, keys = outlying(sample(32, 6, 64), 30), 3 * sample(2, 500, 64, seed=1) + 5
    mu = keys.mean(1)
    balance = balance_of(queries, keys, mu)
    of_queries = (queries.unflatten(1, (2, 3)) / balance[:, None]).square().mean((0, 2)).sqrt()
    of_keys = ((keys - mu[:, None]) * balance[:, None]).square().mean(1).sqrt()
    torch.testing.assert_close(of_queries, of_keys, rtol=1e-4, atol=0)
    assert balance[0, 0] > 4 * balance[0, 1:].max()


def test_balance_of_channels_that_are_never_used_is_finite() -> None:
    queries, keys = sample(32, 2, 64), sample(1, 100, 64, seed=1)
    queries[..., 3] = 0
    keys[..., 5] = 1.25
    mu = keys.mean(1)
    balance = balance_of(queries, keys, mu)
    assert balance.isfinite().all() and (balance >= 1e-6).all()
    codes, scales = encode(keys, mu, balance)
    assert estimate(queries[:1], codes, scales, mu, balance).isfinite().all()


def test_balance_lowers_the_noise_where_queries_have_an_outlier() -> None:
    queries, keys = outlying(sample(33, 1, 64), 20), sample(1, 2000, 64, seed=1)
    mu, query = keys.mean(1), queries[-1:]
    exact = query @ keys.transpose(1, 2)
    plain = estimate(query, *encode(keys, mu), mu) - exact
    balance = balance_of(queries[:32], keys, mu)
    balanced = estimate(query, *encode(keys, mu, balance), mu, balance) - exact
    assert balanced.std() < 0.6 * plain.std()
    assert balanced.mean().abs() < 0.05 * exact.std()


def test_what_is_subtracted_makes_the_sum_of_exponentials_right() -> None:
    """Over many keys the exponentials of estimates add up to those of the logits: without it, to clearly more."""
    keys, queries = sample(8, 4000, 64), 1.5 * sample(33, 8, 64, seed=1)
    mu = keys.mean(1)
    balance = balance_of(queries[:32], keys, mu)
    query = queries[-1].unsqueeze(1)
    codes, scales = encode(keys, mu, balance)
    exact = (query @ keys.transpose(1, 2) * SCALE).logsumexp(-1)
    noisy = estimate(query, codes, scales, mu, balance) * SCALE
    right = (noisy - inflation(query, scales, balance, SCALE)).logsumexp(-1)
    assert (noisy.logsumexp(-1) - exact).mean() > 0.1
    assert (right - exact).mean().abs() < 0.03


# Two ways to rotate a value differ by units in the last place: a channel at an edge of the quantiser may go either way.
NEAR = 2e-6


@pytest.mark.parametrize("rest", ["v1", "v2"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_two_implementations_of_coded_values_agree(rest: str, head_dim: int) -> None:
    values, mu = 2 * sample(2, 150, head_dim), sample(2, head_dim, seed=1)
    values[1, 7] = mu[1]
    found, apart = decoded_back(values, mu, int(rest[1])), 0
    for head, token in itertools.product(range(2), range(150)):
        rotated = _rotate(values[head, token : token + 1].double() - mu[head].double())
        expected = mu[head] + _unrotate(_coded_value(rotated[0], rest)[None])[0, :head_dim].float()
        if not torch.allclose(found[head, token], expected, rtol=1e-3, atol=1e-4):
            u = (rotated[0] / rotated.square().mean().sqrt()).abs()
            assert (torch.minimum(u, (u - 0.9816).abs()) < NEAR).any(), (head, token)
            apart += 1
    assert apart <= 3


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.1175 / 0.8825)])
def test_coded_values_err_as_their_quantiser_does(bits: int, error: float) -> None:
    """What part of the variance is lost: 1 - 2 / pi by signs, 0.1175 / 0.8825 by the unbiased 4-level quantiser."""
    values = outlying(sample(1, 3000, 128), 3)
    mu = values.mean(1)
    lost = (decoded_back(values, mu, bits) - values).square().sum() / (values - mu).square().sum()
    assert abs(lost / error - 1) < 0.05


@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_codes_of_a_page_are_words_of_channels(tokens: int) -> None:
    values = sample(3, tokens, 64)
    for bits in (1, 2):
        codes, scales = encode_values(values, values.mean(1), bits)
        pages = -(-tokens // 16)
        assert codes.shape == (3, pages, 64, 2 * bits) and codes.dtype == torch.uint8
        assert scales.shape == (3, pages * 16) and (scales[:, tokens:] == 0).all()
    codes = torch.zeros((1, 1, 16, 4), dtype=torch.uint8)
    codes[0, 0, 5] = torch.tensor([0b11_10_01_00, 0, 0, 0b01_00_00_00])
    levels = decoded_values(codes)[0, :, 5]
    torch.testing.assert_close(levels[[0, 1, 2, 3, 15]], torch.tensor([-0.4528, -1.5104, 0.4528, 1.5104, -1.5104]))
    codes = torch.zeros((1, 1, 16, 2), dtype=torch.uint8)
    codes[0, 0, 5] = torch.tensor([0b10, 0b10000000])
    assert decoded_values(codes)[0, :, 5].tolist() == [-1, 1] + [-1] * 13 + [1]


def coded(
    tokens: int, heads: int = 2, group: int = 3, bits: int = 2
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """Logits [heads, group, T], lse of other tokens, coded values, and the values [heads, T, 64] they stand for."""
    values = sample(heads, tokens, 64, seed=3)
    mu = values.mean(1)
    logits = torch.nn.functional.pad(2 * sample(heads, group, tokens), (0, -tokens % PAGE_TOKENS), value=math.nan)
    return (
        logits,
        sample(heads, group, seed=4) + 2,
        (*encode_values(values, mu, bits), mu),
        decoded_back(values, mu, bits),
    )


@pytest.mark.parametrize("bits", [1, 2])
def test_rest_is_attention_over_what_is_not_excluded(bits: int) -> None:
    logits, kept_lse, codes, values = coded(75, bits=bits)
    tokens = torch.tensor([75, 75])
    excluded = torch.tensor([[True, False, False, False, False], [False, False, True, False, True]])
    shares = page_shares(logits, tokens, kept_lse)
    state = rest_state(logits, shares, tokens, excluded, *codes, negligible=0)
    for head in range(2):
        unread = [i for i in range(75) if not excluded[head, i // PAGE_TOKENS]]
        weights = logits[head][:, unread].softmax(-1)
        torch.testing.assert_close(state.out[head], weights @ values[head, unread], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.lse[head], logits[head][:, unread].logsumexp(-1))


def test_rest_of_nothing_and_of_refused_heads_is_empty() -> None:
    logits, kept_lse, (codes, scales, mu), _ = coded(75)
    tokens = torch.tensor([75, 75])
    shares = page_shares(logits, tokens, kept_lse)
    mu[1] = math.nan
    excluded = torch.tensor([[True] * 5, [False] * 5])
    state = rest_state(logits, shares, tokens, excluded, codes, scales, mu)
    assert (state.lse == -math.inf).all() and (state.out == 0).all()


def test_two_implementations_of_a_look_with_a_rest_agree() -> None:
    """The reference's head, which decodes everything and attends it plainly, against the product's functions."""
    keys, values, queries = 2 * sample(1, 200, 64), sample(1, 200, 64, seed=1), 2 * sample(33, 3, 64, seed=2)
    evicted = slice(20, 170)
    kept_lse = torch.full((1, 3), 2.0)
    query = queries[-1].unsqueeze(0)
    for rest in ("v1", "v2"):
        settings = Settings(
            kv_budget=50, kv_recall="pages", kv_recall_rest=rest, kv_recall_eps=0.14, kv_recall_pages=20
        )
        mu, value_mu = keys.mean(1), values.mean(1)
        balance = balance_of(queries[:32], keys, mu)
        codes, scales = encode(keys[:, evicted], mu, balance)
        logits = estimate(query, codes, scales, mu, balance) * SCALE - inflation(query, scales, balance, SCALE)
        logits = torch.nn.functional.pad(logits, (0, -150 % PAGE_TOKENS))
        tokens = torch.tensor([150])
        shares = page_shares(logits, tokens, kept_lse)

        of_group = queries[:32].transpose(0, 1)
        reference = HeadRecall(
            keys[0, evicted], keys[0, evicted], values[0, evicted], mu[0], settings, SCALE,
            rest_of(of_group, keys[0], values[0], values[0, evicted], rest),
        )  # fmt: skip
        step = reference.step(query[0], kept_lse[0], [])
        torch.testing.assert_close(torch.tensor(reference.shares), shares[0].amax(0), rtol=1e-3, atol=1e-6)
        wanted = shares.amax(1) > 0.14
        assert 0 < wanted.sum() == step.pages
        read = wanted.repeat_interleave(PAGE_TOKENS, -1)[:, :150]
        exact = attention_state(query, keys[:, evicted], values[:, evicted], SCALE, read)
        of_values = encode_values(values[:, evicted], value_mu, int(rest[1]))
        state = merge_states(exact, rest_state(logits, shares, tokens, wanted, *of_values, value_mu))
        torch.testing.assert_close(state.out[0], step.out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.lse[0], step.lse, rtol=1e-4, atol=1e-4)


def test_bytes_are_those_of_the_design() -> None:
    assert [value_bytes(64, rest) for rest in ("none", "v1", "v2")] == [0, 10, 18]
    assert [value_bytes(128, rest) for rest in ("none", "v1", "v2")] == [0, 18, 34]
    found = recall_bytes(2048, 64, "v2", 4, torch.bfloat16)
    assert found == (2048 * 18, 2048 * 18, 3 * 64 * 4, 4 * (2 * 16 * 64 * 2 + 16))
    assert abs((found.keys + found.values) / (2048 * 256) - 0.1406) < 1e-4
    assert recall_bytes(2048, 64, "none", 0, torch.bfloat16) == (2048 * 18, 0, 256, 0)
