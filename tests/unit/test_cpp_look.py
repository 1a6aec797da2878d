"""The look and the rest in C++ against torch, one KV head at a time."""

from __future__ import annotations

import ctypes
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState
from vllm_calidrop.evicted.layout import PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS, pages_for, swap_blocks_for
from vllm_calidrop.evicted.recall.balance import balance_of
from vllm_calidrop.evicted.recall.looks import page_shares
from vllm_calidrop.evicted.recall.rest import NEGLIGIBLE, rest_state
from vllm_calidrop.evicted.recall.sketch import encode, estimate, inflation
from vllm_calidrop.evicted.recall.store import by_word
from vllm_calidrop.evicted.recall.values import encode_values
from vllm_calidrop.ops.cpp import build
from vllm_calidrop.ops.cpp.look import CodedHead, Look, operator_of

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

SCALE = 0.25


@pytest.fixture(scope="module")
def operator() -> Any:
    return operator_of(ctypes.CDLL(str(build.library())))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the compiler makes for the baseline CPU, where levels are selected instead of looked up."""
    folder = tmp_path_factory.mktemp("baseline")
    for source in ("look.cpp", *(path.name for path in build.SOURCES.glob("*.h"))):
        shutil.copy(build.SOURCES / source, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", folder)
        patch.setattr(build, "TARGETS", ((),))
        patch.setattr(build, "FLAGS", ("-O1", *(flag for flag in build.FLAGS if flag != "-O3")))
        return operator_of(ctypes.CDLL(str(build.library(folder))))


def in_blocks(pages: Tensor, blocks: Tensor, fill: float) -> Tensor:
    """Pages [P, ...] of a sequence where its blocks lie, among blocks that are nobody's."""
    placed = torch.full((int(blocks.max()) + 2, PAGES_PER_BLOCK, *pages.shape[1:]), fill).to(pages.dtype)
    for page, content in enumerate(pages):
        placed[blocks[page // PAGES_PER_BLOCK], page % PAGES_PER_BLOCK] = content
    return placed


class Case:
    """A KV head's evicted tokens, coded, in C++'s layout and as torch takes them, and a query group."""

    def __init__(self, tokens: int, heads: int, head_dim: int, bits: int, spread: float = 1.5) -> None:
        torch.manual_seed(tokens + heads + bits)
        self.tokens, self.query = tokens, torch.randn(heads, head_dim) * torch.linspace(0.2, 2, head_dim)
        keys = spread * torch.randn(1, tokens, head_dim) + torch.randn(1, 1, head_dim)
        values = torch.randn(1, tokens, head_dim) + torch.randn(1, 1, head_dim)
        self.mu, self.value_mu = keys.mean(1), values.mean(1)
        self.balance = balance_of(torch.randn(32, heads, head_dim) * torch.linspace(0.2, 2, head_dim), keys, self.mu)
        self.codes, self.scales = encode(keys, self.mu, self.balance)
        self.value_codes, self.value_scales = encode_values(values, self.value_mu, bits)
        self.blocks = torch.randperm(swap_blocks_for(tokens) + 2)[: swap_blocks_for(tokens)].int()
        padding = swap_blocks_for(tokens) * SWAP_BLOCK_TOKENS - tokens
        filled = torch.nn.functional.pad(self.codes[0], (0, 0, 0, padding))
        in_pages = pages_for(tokens)
        scales = torch.nn.functional.pad(self.scales[0], (0, -tokens % 16), value=math.nan).unflatten(0, (-1, 16))
        self.head = CodedHead(
            in_blocks(by_word(filled)[:in_pages], self.blocks, 255),
            in_blocks(scales, self.blocks, math.nan),
            self.mu[0],
            in_blocks(self.value_codes[0], self.blocks, 255),
            in_blocks(self.value_scales[0].unflatten(0, (-1, 16)), self.blocks, math.nan),
            self.value_mu[0],
            self.balance[0].contiguous(),
        )
        self.kept_lse = torch.randn(heads) + 3

    def in_torch(self, excluded: Tensor, negligible: float) -> tuple[Tensor, AttentionState]:
        query = self.query[None]
        logits = estimate(query, self.codes, self.scales, self.mu, self.balance) * SCALE
        logits = logits - inflation(query, self.scales, self.balance, SCALE)
        logits = torch.nn.functional.pad(logits, (0, -self.tokens % 16))
        tokens = torch.tensor([self.tokens])
        shares = page_shares(logits, tokens, self.kept_lse[None])
        is_excluded = torch.zeros((1, pages_for(self.tokens)), dtype=torch.bool)
        is_excluded[0, excluded] = True
        coded = (self.value_codes, self.value_scales, self.value_mu)
        state = rest_state(logits, shares, tokens, is_excluded, *coded, negligible=negligible)
        return shares[0], AttentionState(state.out[0], state.lse[0])


def compare(operator: Any, case: Case, excluded: list[int], negligible: float = NEGLIGIBLE) -> None:
    pages = torch.tensor(excluded, dtype=torch.int64)
    shares, state = case.in_torch(pages, negligible)
    look = Look(operator, case.head, case.query, case.blocks, case.tokens, case.kept_lse, pages, SCALE, negligible)
    for _ in range(2):  # the second time in the scratch of the first
        look()
        torch.testing.assert_close(look.shares, shares, rtol=2e-5, atol=1e-9)
        torch.testing.assert_close(look.state.lse, state.lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(look.state.out, state.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (2, 128), (4, 32), (7, 64), (3, 80), (1, 256), (5, 16)])
def test_equals_torch(operator: Any, bits: int, heads: int, head_dim: int) -> None:
    for tokens in (1, 16, 130, 700):
        last = pages_for(tokens) - 1
        for excluded in ([], [0], sorted({0, last // 2, last}), list(range(last + 1))):
            compare(operator, Case(tokens, heads, head_dim, bits), excluded)


@pytest.mark.parametrize("bits", [1, 2])
def test_without_vector_instructions(baseline: Any, bits: int) -> None:
    compare(baseline, Case(300, 7, 64, bits), [3, 18])


@pytest.mark.parametrize("bits", [1, 2])
def test_negligible_pages_give_their_weight_to_the_mean_value(operator: Any, bits: int) -> None:
    """C++ leaves the same pages out as torch, and the error is bounded by the shares that were left out."""
    case = Case(900, 2, 64, bits, spread=4.0)
    compare(operator, case, [1], negligible=0.4)
    shares, exact = case.in_torch(torch.tensor([1]), 0.0)
    state = case.in_torch(torch.tensor([1]), 0.4)[1]
    small = shares.amax(0) * shares.shape[1] < 0.4
    small[1] = False
    assert 5 < small.sum() < 56 and not torch.equal(state.out, exact.out)
    assert torch.equal(state.lse, exact.lse)
    of_rest = shares[:, small].sum(-1) / (shares.sum(-1) - shares[:, 1])
    decoded_length = 2.0 * case.value_scales.float().max() * 64**0.5
    assert ((state.out - exact.out).norm(dim=-1) <= of_rest * decoded_length).all()


def test_heads_whose_kv_must_not_be_read_have_no_rest(operator: Any) -> None:
    case = Case(200, 2, 64, 2)
    case.head.mu.fill_(math.nan)
    look = Look(operator, case.head, case.query, case.blocks, 200, case.kept_lse, torch.tensor([0]), SCALE)
    look()
    assert look.shares.isnan().all()
    assert (look.state.lse == -math.inf).all() and (look.state.out == 0).all()


def test_a_rest_whose_weights_underflow_is_not_empty(operator: Any) -> None:
    """Beside kept tokens that take all of the attention the state still exists, and merges of it are counted."""
    case = Case(200, 2, 64, 2)
    kept_lse = torch.full((2,), 500.0)
    look = Look(operator, case.head, case.query, case.blocks, 200, kept_lse, torch.tensor([0]), SCALE)
    look()
    assert (look.shares == 0).all()
    assert (look.state.lse > -math.inf).all() and (look.state.lse < 420).all()
    torch.testing.assert_close(look.state.out, case.value_mu.expand(2, -1))


def test_a_look_alone_needs_no_values(operator: Any) -> None:
    """Without a rest: no balance, nothing subtracted, and the shares are those of the plain sketch."""
    case = Case(300, 3, 64, 2)
    keys_only = case.head._replace(value_codes=None, value_scales=None, value_mu=None, balance=None)
    look = Look(operator, keys_only, case.query, case.blocks, 300, case.kept_lse, torch.tensor([0]), SCALE)
    look()
    logits = torch.nn.functional.pad(estimate(case.query[None], case.codes, case.scales, case.mu) * SCALE, (0, 4))
    shares = page_shares(logits, torch.tensor([300]), case.kept_lse[None])
    torch.testing.assert_close(look.shares, shares[0], rtol=2e-5, atol=1e-9)
