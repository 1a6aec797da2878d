"""The reference is right: it is Hugging Face's model, its policies keep what one finds by hand, and a second,
differently written reference takes the same decisions."""

from __future__ import annotations

import ast
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.reference import Reference, Result, Settings
from tests.reference.attention import State, attention_state, cosine, decide, merge
from tests.reference.policies import select
from tests.reference.second import SecondReference, SecondResult

VOCAB = 97
POLICIES = ("snapkv", "h2o", "streaming_llm")
GATES = ("group", "head", "group_mean")


def tiny_llama(seed: int, heads: int = 4, kv_heads: int = 2, tied: bool = False) -> LlamaForCausalLM:
    """A random Llama whose attention is far from uniform and whose answers vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.0 if "embed" in name else 64**-0.5)
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(2.0)
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=tokens)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(seed=1)


@pytest.fixture(scope="module")
def reference(model: LlamaForCausalLM) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def exact(model: LlamaForCausalLM) -> Reference:
    return Reference(model, dtype=torch.float64)


@pytest.fixture(scope="module")
def second(model: LlamaForCausalLM) -> SecondReference:
    return SecondReference(model)


def hugging_face_logprobs(model: LlamaForCausalLM, ids: list[int], answer: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0]
    return [logits[len(ids) - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(answer)]


def assert_same(first: Result, other: SecondResult, tolerance: float) -> None:
    assert first.tokens == other.tokens
    assert [layer.tolist() for layer in first.kept] == other.kept
    assert [layer.tolist() for layer in first.hosted] == other.hosted
    for name in ("recomputes", "merges", "plain", "group_reads"):
        assert getattr(first, name) == [layer[name] for layer in other.counts], name
    assert first.logprobs == pytest.approx(other.logprobs, abs=tolerance)


# The model is Hugging Face's


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 2, True), (4, 2, False), (4, 1, False), (2, 2, False)])
def test_logits_are_hugging_faces(heads: int, kv_heads: int, tied: bool) -> None:
    model = tiny_llama(3, heads, kv_heads, tied)
    ids = prompt(80)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(Reference(model).logits(ids), expected, atol=1e-4, rtol=0)
    exact = Reference(model, torch.float64).logits(ids)
    torch.testing.assert_close(exact, expected.double(), atol=1e-4, rtol=0)


def test_loads_from_a_directory(model: LlamaForCausalLM, reference: Reference, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert torch.equal(Reference(tmp_path).logits(prompt(30)), reference.logits(prompt(30)))


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(kv_budget=50), Settings(kv_budget=70), Settings(kv_budget=8, kv_policy="full")],
)
def test_untouched_prompts_are_plain_greedy_decoding(
    model: LlamaForCausalLM, reference: Reference, settings: Settings
) -> None:
    ids = prompt(50)
    result = reference.generate(ids, 20, settings)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, 50:].tolist()
    assert result.tokens == expected and len(set(expected)) > 5
    assert result.recomputes == result.merges == result.plain == result.group_reads == [0, 0, 0, 0]
    assert (result.prompt_tokens, result.kept_count, result.evicted_count) == (50, 50, 0)
    assert all(layer.tolist() == [list(range(50))] * 2 for layer in result.kept)
    assert result.margins.rho == result.margins.score == float("inf")


# The two references agree


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_two_references_agree(exact: Reference, second: SecondReference, policy: str, gate: str) -> None:
    """In float64, where nothing is left to rounding. Every branch is taken, in every layer."""
    thresholds = [(0.4, 0.6), (0.0, 0.3), (0.2, 0.2)]
    taken = torch.zeros(3, 4, dtype=torch.long)
    for seed, (theta1, theta2) in enumerate(thresholds):
        settings = Settings(16 + seed, policy, theta1, theta2, gate, kv_calibration_size=[None, 11, None][seed])
        ids = prompt(40 + 7 * seed, seed)
        result = exact.generate(ids, 20, settings)
        assert_same(result, second.generate(ids, 20, settings), tolerance=1e-9)
        counts = torch.tensor([result.recomputes, result.merges, result.plain])
        assert counts.sum(0).tolist() == [19 * 4] * 4
        taken += counts
    assert (taken > 0).all(), taken


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)])
def test_the_two_references_agree_on_other_group_sizes(heads: tuple[int, int]) -> None:
    model = tiny_llama(5, *heads)
    first, second = Reference(model, torch.float64), SecondReference(model)
    for gate in GATES:
        settings = Settings(12, "snapkv", 0.2, 0.4, gate)
        assert_same(first.generate(prompt(40), 15, settings), second.generate(prompt(40), 15, settings), 1e-9)


def test_float32_decides_as_float64_outside_the_margins(reference: Reference, second: SecondReference) -> None:
    compared = 0
    for seed in range(12):
        settings = Settings(14, POLICIES[seed % 3], 0.1, 0.3, GATES[seed // 4])
        ids = prompt(45, seed)
        result = reference.generate(ids, 15, settings)
        margins = result.margins
        if margins.rho < 1e-5 or margins.score < 1e-6 or margins.logit < 1e-4:
            continue
        compared += 1
        assert_same(result, second.generate(ids, 15, settings), tolerance=1e-4)
    assert compared >= 10


@pytest.mark.parametrize(
    "settings",
    [
        Settings(9, kv_window=9),
        Settings(9, kv_window=2, kv_pool_kernel=1),
        Settings(10, kv_pool_kernel=4),
        Settings(1),
        Settings(1, "h2o"),
        Settings(1, "streaming_llm"),
        Settings(9, "streaming_llm", kv_sinks=0),
        Settings(9, "streaming_llm", kv_sinks=9, kv_calibration_size=5),
        Settings(39, "h2o"),
        Settings(39, kv_pool_kernel=9, kv_calibration_size=1),
        Settings(9, kv_calibration=False),
    ],
)
def test_the_two_references_agree_at_the_edges(exact: Reference, second: SecondReference, settings: Settings) -> None:
    ids, settings = prompt(40), replace(settings, kv_theta1=0.2, kv_theta2=0.4)
    assert_same(exact.generate(ids, 8, settings), second.generate(ids, 8, settings), tolerance=1e-9)


# Extremes that are known without a second reference


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("policy", POLICIES)
def test_recomputing_always_is_full_attention(
    model: LlamaForCausalLM, reference: Reference, policy: str, gate: str
) -> None:
    ids, answer = prompt(60), prompt(12, seed=9)
    result = reference.generate(ids, 12, Settings(13, policy, 2.0, 2.0, gate), forced=answer)
    expected = hugging_face_logprobs(model, ids, answer)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert result.recomputes == [11 * 4] * 4 and result.group_reads == [11 * 2] * 4
    evicted_only = reference.generate(ids, 12, Settings(13, policy, kv_calibration=False), forced=answer)
    assert evicted_only.logprobs[0] == pytest.approx(expected[0], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(evicted_only.logprobs[1:], expected[1:], strict=True)) > 0.05


def test_never_recomputing_always_merges_the_prompts_state(reference: Reference) -> None:
    result = reference.generate(prompt(60), 12, Settings(13, kv_theta1=-2, kv_theta2=-2))
    assert result.merges == [11 * 4] * 4
    assert result.recomputes == result.plain == result.group_reads == [0] * 4
    unused = reference.generate(prompt(60), 12, Settings(13, kv_theta1=-2, kv_theta2=2))
    off = reference.generate(prompt(60), 12, Settings(13, kv_calibration=False))
    assert unused.plain == [11 * 4] * 4 and unused.logprobs == off.logprobs != result.logprobs


def test_calibration_sizes(reference: Reference) -> None:
    ids, answer = prompt(60), prompt(12, seed=9)

    def run(size: int | None, calibration: bool = True, policy: str = "snapkv") -> Result:
        settings = Settings(20, policy, 0.2, 0.4, kv_calibration=calibration, kv_calibration_size=size)
        return reference.generate(ids, 12, settings, forced=answer)

    off, none = run(None, calibration=False), run(0)
    assert none.logprobs == off.logprobs and (none.decisions == off.decisions).all()
    assert off.recomputes == off.merges == off.plain == off.group_reads == [0] * 4
    assert off.evicted_count == 40 and off.hosted[0].shape == (2, 0)

    everything = run(None)
    assert run(40).logprobs == run(1000).logprobs == everything.logprobs != off.logprobs
    for kept, hosted in zip(everything.kept, everything.hosted, strict=True):
        assert torch.cat([kept, hosted], -1).sort(-1).values.tolist() == [list(range(60))] * 2

    part = run(15)
    assert part.hosted[0].shape == (2, 15) and part.logprobs not in (everything.logprobs, off.logprobs)
    assert torch.equal(part.kept[0], everything.kept[0])
    streaming = run(5, policy="streaming_llm")
    assert streaming.kept[3].tolist() == [[*range(10), *range(50, 60)]] * 2
    assert streaming.hosted[3].tolist() == [[45, 46, 47, 48, 49]] * 2


# The interface


def test_forced_tokens_and_the_end_token(reference: Reference) -> None:
    ids, settings = prompt(60), Settings(13, kv_theta1=0.2, kv_theta2=0.4)
    free = reference.generate(ids, 10, settings)
    again = reference.generate(ids, 10, settings, forced=free.tokens[:6])
    assert again.tokens == free.tokens and again.logprobs == free.logprobs
    third = free.tokens[2]
    assert third not in free.tokens[:2]
    ended = reference.generate(ids, 10, settings, eos_token_id=third)
    assert ended.tokens == free.tokens[:3] and ended.decisions.shape == (2, 4, 2, 2)
    assert reference.generate(ids, 1, settings).decisions.shape == (0, 4, 2, 2)
    assert reference.generate(ids, 1, settings).recomputes == [0] * 4


def test_margins(reference: Reference) -> None:
    settings = Settings(13, "h2o", 0.2, 0.4, kv_calibration_size=10)
    result = reference.generate(prompt(60), 10, settings)
    rho = result.rhos
    band = torch.minimum((rho - 0.2).abs(), (rho - 0.4).abs()).min().item()
    assert 0 < band <= result.margins.rho < 1  # heads carried along by their group do not count
    alone = reference.generate(prompt(60), 10, Settings(13, "h2o", 0.2, 0.4, "head"))
    band = torch.minimum((alone.rhos - 0.2).abs(), (alone.rhos - 0.4).abs()).min().item()
    assert alone.margins.rho == pytest.approx(band, abs=1e-6)
    assert 0 < result.margins.score <= reference.generate(prompt(60), 1, Settings(13, "h2o")).margins.score < 1
    assert 0 < result.margins.logit < 5


@pytest.mark.parametrize("policy", POLICIES)
def test_preemption_agrees_with_the_second_reference(exact: Reference, second: SecondReference, policy: str) -> None:
    ids, settings = prompt(45), Settings(15, policy, 0.2, 0.4, kv_calibration_size=20)
    whole = exact.generate(ids, 14, settings)
    for resume_at in (1, 5, 13):
        result = exact.generate(ids, 14, settings, resume_at=resume_at)
        assert_same(result, second.generate(ids, 14, settings, resume_at=resume_at), tolerance=1e-9)
        assert result.tokens[:resume_at] == whole.tokens[:resume_at]
        assert result.logprobs[:resume_at] == whole.logprobs[:resume_at] and result.logprobs != whole.logprobs
        assert all(torch.equal(a, b) for a, b in zip(result.kept, whole.kept, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result.hosted, whole.hosted, strict=True))
        assert result.decisions.shape[0] == 12  # one token more came from a prefill
        assert torch.equal(result.decisions[: resume_at - 1], whole.decisions[: resume_at - 1])
    assert exact.generate(ids, 14, settings, resume_at=14).logprobs == whole.logprobs


def test_the_token_after_a_preemption_comes_from_full_attention(model: LlamaForCausalLM, reference: Reference) -> None:
    ids, answer = prompt(60), prompt(12, seed=9)
    expected = hugging_face_logprobs(model, ids, answer)
    settings = Settings(6, kv_calibration=False)
    result = reference.generate(ids, 12, settings, forced=answer, resume_at=7)
    close = [abs(a - b) < 1e-4 for a, b in zip(result.logprobs, expected, strict=True)]
    assert [i for i, same in enumerate(close) if same] == [0, 7]
    short = reference.generate(ids, 12, Settings(60), forced=answer, resume_at=7)  # outputs are never counted
    assert short.logprobs == pytest.approx(expected, abs=1e-4) and short.evicted_count == 0


# Policies by hand: head_dim 1 or one dimension per query, scale 1, so that the logits are what is written


def kept_and_evicted(logits: Tensor, settings: Settings) -> tuple[list[list[int]], list[list[int]]]:
    """logits [kv_heads, group, P, P] -> via queries that are their own rows and keys that are unit
    vectors.
    """
    kv_heads, _, tokens, _ = logits.shape
    keys = torch.eye(tokens).expand(kv_heads, tokens, tokens)
    selection = select(logits, keys, 1.0, settings)
    assert selection.kept.sort(-1).values.equal(selection.kept)
    return selection.kept.tolist(), selection.evicted.tolist()


def test_h2o_with_uniform_attention() -> None:
    """Token j receives 1/(j+1) + ... + 1/P: the earlier, the more. 7 = 3 heavy + 4 recent."""
    kept, evicted = kept_and_evicted(torch.zeros(1, 1, 12, 12), Settings(7, "h2o"))
    assert kept == [[0, 1, 2, 8, 9, 10, 11]]
    assert evicted == [[3, 4, 5, 6, 7]]


def test_h2o_sums_over_all_queries_and_averages_the_group() -> None:
    logits = torch.full((2, 2, 10, 10), -30.0)
    logits[..., 0] = 0.0  # all attend token 0 ...
    logits[0, 0, 4:7, 3] = 10.0  # ... except three early queries of head 0 (token 3)
    logits[0, 1, 7:9, 5] = 10.0  # and two of head 1 (token 5)
    logits[1, :, 9, 9] = 30.0  # the recent half is not ranked
    logits[1, 0, 6, 6] = 10.0
    kept, _ = kept_and_evicted(logits, Settings(6, "h2o"))
    assert kept[0] == [0, 3, 5, 7, 8, 9]
    assert kept[1][0] == 0 and 6 in kept[1] and kept[1][-3:] == [7, 8, 9]
    # a future token may have a huge logit: the softmax is causal
    logits[0, :, :2, 6] = 50.0
    assert kept_and_evicted(logits, Settings(6, "h2o"))[0][0] == kept[0]


def test_snapkv_with_uniform_attention_shows_padding_and_ties() -> None:
    """All votes are equal: pooling with padded zeros counted lowers two positions at each end of the 10
    before the window (scores 3/5 4/5 1 1 1 1 1 1 4/5 3/5); equal scores go to the lower position."""
    kept, evicted = kept_and_evicted(torch.zeros(1, 1, 13, 13), Settings(7, kv_window=3))
    assert kept == [[2, 3, 4, 5, 10, 11, 12]]
    assert evicted == [[6, 7, 1, 8, 0, 9]]
    kept, evicted = kept_and_evicted(torch.zeros(1, 1, 13, 13), Settings(7, kv_window=3, kv_pool_kernel=1))
    assert kept == [[0, 1, 2, 3, 10, 11, 12]] and evicted == [[4, 5, 6, 7, 8, 9]]
    # kernel 4, padding 2, first 10 outputs: 2 3 4 4 4 4 4 4 4 3 (quarters)
    kept, evicted = kept_and_evicted(torch.zeros(1, 1, 13, 13), Settings(10, kv_window=3, kv_pool_kernel=4))
    assert kept == [[2, 3, 4, 5, 6, 7, 8, 10, 11, 12]] and evicted == [[1, 9, 0]]


def test_snapkv_normalises_over_all_keys_and_does_not_pool_the_window() -> None:
    """One query attends the window (softmax over earlier keys alone would give token 1 two votes), one token
    5.
    """
    logits = torch.zeros(1, 1, 12, 12)
    logits[0, 0, 10, [1, 10]] = torch.tensor([3.0, 9.0])
    logits[0, 0, 11, 5] = 2.0
    settings = Settings(3, kv_window=2, kv_pool_kernel=1)
    row10 = [math.exp(3.0 * (i == 1) + 9.0 * (i == 10)) for i in range(11)]
    row11 = [math.exp(2.0 * (i == 5)) for i in range(12)]
    votes = [row10[i] / sum(row10) + row11[i] / sum(row11) for i in range(10)]
    assert max(range(10), key=votes.__getitem__) == 5
    kept, evicted = kept_and_evicted(logits, settings)
    assert kept == [[5, 10, 11]] and evicted[0][0] == 1
    # both window tokens are attended strongly: pooled into their neighbours they would keep 8 and 9
    logits = torch.zeros(1, 1, 12, 12)
    logits[0, 0, 10:, 10] = 6.0
    logits[0, 0, 10:, 3:5] = 1.0
    assert kept_and_evicted(logits, Settings(4, kv_window=2, kv_pool_kernel=3))[0] == [[3, 4, 10, 11]]


def test_snapkv_is_causal_inside_the_window_and_ignores_queries_before_it() -> None:
    logits = torch.zeros(1, 2, 12, 12)
    logits[0, :, :9, 7] = 20.0  # queries before the window: no votes
    logits[0, 0, 9, 2] = 4.0
    logits[0, :, 9, 11] = 50.0  # the future: masked
    kept, _ = kept_and_evicted(logits, Settings(4, kv_window=3, kv_pool_kernel=1))
    assert kept == [[2, 9, 10, 11]]


def test_streaming_llm() -> None:
    zeros = torch.zeros(2, 1, 12, 12)
    assert kept_and_evicted(zeros, Settings(5, "streaming_llm"))[0] == [[0, 1, 9, 10, 11]] * 2
    kept, evicted = kept_and_evicted(zeros, Settings(5, "streaming_llm", kv_sinks=4))
    assert kept == [[0, 1, 2, 3, 11]] * 2 and evicted == [[10, 9, 8, 7, 6, 5, 4]] * 2


@pytest.mark.parametrize(
    ("budget", "window", "sinks"),
    [(1, 1, 0), (2, 1, 1), (7, 3, 3), (63, 31, 31), (64, 32, 32), (200, 32, 32)],
)
def test_defaults_shrink_with_the_budget(budget: int, window: int, sinks: int) -> None:
    assert (Settings(budget).window, Settings(budget).sinks) == (window, sinks)


@pytest.mark.parametrize("policy", POLICIES)
def test_exactly_the_budget_is_kept(policy: str) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 2, 40, 40)
    for budget in (1, 2, 3, 7, 20, 39):
        kept, evicted = kept_and_evicted(logits, Settings(budget, policy))
        for head_kept, head_evicted in zip(kept, evicted, strict=True):
            assert len(head_kept) == budget and sorted(head_kept + head_evicted) == list(range(40))


def test_score_gap() -> None:
    selection = select(torch.zeros(1, 1, 13, 13), torch.eye(13).expand(1, 13, 13), 1.0, Settings(7, kv_window=3))
    assert selection.gap(4) == 0.0  # a tie decides
    assert selection.gap(6) == pytest.approx(0.2)  # 1 against 4/5
    assert selection.gap(0) == selection.gap(10) == float("inf")


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_policy": "lru"},
        {"kv_gate": "any"},
        {"kv_theta1": 0.9},
        {"kv_budget": 0},
        {"kv_budget": 8, "kv_window": 9},
        {"kv_budget": 8, "kv_sinks": 9},
        {"kv_calibration_size": -1},
        {"kv_pool_kernel": 0},
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Settings(**arguments)  # type: ignore[arg-type]


# Attention states and the gate


def test_states_merge_to_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 8), 4 * torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    whole = attention_state(q, k, v, 0.5)
    expected = (0.5 * q @ k.transpose(1, 2)).exp()
    torch.testing.assert_close(whole.out, expected @ v / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(whole.lse, expected.sum(-1).log())
    for cut in (0, 1, 7, 20):
        parts = merge(attention_state(q, k[:, :cut], v[:, :cut], 0.5), attention_state(q, k[:, cut:], v[:, cut:], 0.5))
        torch.testing.assert_close(parts.out, whole.out)
        torch.testing.assert_close(parts.lse, whole.lse)


def test_an_empty_set_changes_nothing_and_large_logits_do_not_overflow() -> None:
    q, none = torch.randn(2, 3, 8), torch.empty(2, 0, 8)
    empty = attention_state(q, none, none, 1.0)
    assert (empty.lse == -math.inf).all() and (empty.out == 0).all()
    some = State(torch.randn(2, 3, 8), torch.full((2, 3), 1000.0))
    for merged in (merge(some, empty), merge(empty, some)):
        assert torch.equal(merged.out, some.out) and torch.equal(merged.lse, some.lse)
    both = merge(empty, empty)
    assert (both.lse == -math.inf).all() and (both.out == 0).all()
    twice = merge(some, some)
    torch.testing.assert_close(twice.lse, some.lse + math.log(2))


def test_cosine() -> None:
    q = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    c = torch.tensor([[6.0, 8.0], [0.0, -2.0], [1.0, 1.0]])
    assert cosine(q, c).tolist() == [1.0, 0.0, 0.0]
    assert cosine(1e-6 * q, -1e-6 * c)[0].item() == pytest.approx(-1.0)


def test_the_gate() -> None:
    """Thresholds 0.25 and 0.75, exact in binary; a rho on a threshold is inside the band."""
    rho = torch.tensor([[0.125, 0.875], [0.25, 0.75], [0.5, 1.0]])
    none, both, second = [False, False], [True, True], [False, True]

    recompute, merged, margin = decide(rho, 0.25, 0.75, "head")
    assert recompute.tolist() == [[True, False], none, none]
    assert merged.tolist() == [second, none, second]
    assert margin == 0.0

    recompute, merged, _ = decide(rho, 0.25, 0.75, "group")
    assert recompute.tolist() == [both, none, none]
    assert merged.tolist() == [none, none, second]

    recompute, merged, _ = decide(rho, 0.25, 0.75, "group_mean")
    assert not recompute.any() and not merged.any()  # means 0.5, 0.5 and 0.75
    recompute, merged, _ = decide(rho, 0.625, 0.6875, "group_mean")
    assert recompute.tolist() == [both, both, none] and merged.tolist() == [none, none, both]

    recompute, merged, _ = decide(rho, 0.25, 0.25, "head")
    assert recompute.tolist() == [[True, False], none, none]
    assert merged.tolist() == [second, second, both]


def test_margin_counts_only_what_can_change_a_decision() -> None:
    carried = torch.tensor([[0.125, 0.7501]])  # recomputed whatever the second head does
    assert decide(carried, 0.25, 0.75, "group").margin == pytest.approx(0.125)
    assert decide(carried, 0.25, 0.75, "head").margin == pytest.approx(1e-4, rel=1e-2)
    assert decide(carried, 0.25, 0.75, "group_mean").margin == pytest.approx(0.18755, rel=1e-3)
    assert decide(torch.tensor([[0.26, 0.9]]), 0.25, 0.75, "group").margin == pytest.approx(0.01, rel=1e-3)
    assert decide(torch.tensor([[0.5, 0.7]]), 0.25, 0.75, "group").margin == pytest.approx(0.05, rel=1e-3)


def test_the_reference_is_independent() -> None:
    """Neither vLLM nor the package under test may be imported by it."""
    for path in (Path(__file__).parents[1] / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("vllm", "vllm_calidrop") for name in names), path
