"""What goes on around a sequence must not change its answer, and nothing may stay behind when it ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.engine.cases import CALIBRATION, POLICIES, CachedReference, prompt_of
from tests.engine.harness import MAY_STOP, Answer, Ask, Engine, assert_equal_to_reference, too_close
from vllm_calidrop.scheduler.ids import FreeList

pytestmark = pytest.mark.engine
ENGINES = ("block32-whole", "block16-chunk100", "block128-chunk64")


def mixed_asks(count: int, seed: int = 0, max_tokens: int = 16) -> list[Ask]:
    """Different budgets, policies and thresholds, and every fifth request without any."""
    rng = random.Random(seed)
    asks = []
    for index in range(count):
        settings = {
            "kv_policy": rng.choice(POLICIES),
            "kv_budget": rng.choice((32, 64, 128)),
            **rng.choice(CALIBRATION),
        }
        prompt = prompt_of(rng.choice((120, 200, 330, 517)), seed=seed * 1000 + index)
        asks.append(Ask(prompt, max_tokens, {} if index % 5 == 4 else settings))
    return asks


def assert_same(asks: list[Ask], answers: list[Answer], expected: list[Answer], reference: CachedReference) -> None:
    """Equal answers, but for prompts the reference itself calls too close (at most one)."""
    differing = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if a.tokens != b.tokens]
    assert all(too_close(reference(asks[i])) for i in differing), differing
    assert len(differing) <= 1, differing


def test_without_a_budget_tokens_are_those_of_the_stock_backend(engine_named: Callable[[str], Engine]) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate((60, 200, 330, 517, 700, 1000) * 2)]
    stock = [answer.tokens for answer in engine_named("stock").ask([Ask(p, 24) for p in prompts])]
    engine = engine_named("block32-whole")
    for settings in ({}, {"kv_budget": 1100}, {"kv_budget": 64, "kv_policy": "full"}, {"kv_theta1": -2.0}):
        answers = engine.ask([Ask(p, 24, dict(settings)) for p in prompts])
        assert [answer.tokens for answer in answers] == stock, settings
        assert all(answer.report["evicted"] == 0 and answer.report["mode"] == "full" for answer in answers)


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputing_at_every_step_equals_full_kv(
    policy: str, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """theta1 = 2: 60 prompts, budgets 32, 64 and 128."""
    engine = engine_named("block32-whole")
    prompts = [prompt_of(random.Random(seed).randrange(200, 900), seed) for seed in range(60)]
    full = [Ask(prompt, 12) for prompt in prompts]
    expected = engine.ask(full)
    for budget in (32, 64, 128):
        settings = {"kv_policy": policy, "kv_budget": budget, "kv_theta1": 2.0, "kv_theta2": 2.0}
        answers = engine.ask([Ask(prompt, 12, settings) for prompt in prompts])
        assert_same(full, answers, expected, reference)
        for answer in answers:
            assert answer.report["merges"] == answer.report["plain"] == 0 < answer.report["recomputes"]


@pytest.mark.parametrize("name", ENGINES)
def test_neighbours_do_not_change_an_answer(
    name: str, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """Alone, among 8 and among 40; and the same in each engine, whatever its block size and chunks."""
    engine, asks = engine_named(name), mixed_asks(41)
    assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
    for count in (1, 9):
        chosen = asks[:count]
        assert_equal_to_reference(chosen, engine.ask(chosen), [reference(ask) for ask in chosen])
    engine.assert_nothing_in_use()


def test_prefix_hits_are_used_and_change_nothing(
    engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """Cut so that compaction never writes a shared block, while plain and compressed requests share a prefix."""
    engine = engine_named("block32-whole")
    prompt = prompt_of(900, seed=901)
    plain = Ask(prompt, 16)
    asks = [Ask(prompt, 16, {"kv_policy": policy, "kv_budget": 64}) for policy in POLICIES]
    first = engine.ask([plain])[0]
    for ask in (*asks, *asks):
        answer = engine.ask([ask])[0]
        assert_equal_to_reference([ask], [answer], [reference(ask)])
        if ask.settings["kv_policy"] == "h2o":
            assert answer.cached_tokens == 0  # it needs every query
        else:
            assert 0 < answer.cached_tokens <= (len(prompt) - 64) // 32 * 32
    again = engine.ask([plain])[0]
    assert again.tokens == first.tokens
    assert again.cached_tokens > len(prompt) - 64, "the plain request's own blocks were overwritten or lost"
    together = [plain, *asks, plain]
    answers = engine.ask(together)
    assert_equal_to_reference(together, answers, [reference(ask) for ask in together])
    engine.assert_nothing_in_use()


def test_a_prompt_cached_by_a_compressed_request_only_below_g(engine_named: Callable[[str], Engine]) -> None:
    """What a compressed sequence leaves in the prefix cache is its uncompressed blocks, never compacted ones."""
    engine = engine_named("block32-whole")
    prompt = prompt_of(700, seed=77)
    engine.ask([Ask(prompt, 40, {"kv_budget": 128})])
    plain = engine.ask([Ask(prompt, 8)])[0]
    assert plain.cached_tokens == (len(prompt) - 128) // 32 * 32
    assert plain.tokens == engine_named("stock").ask([Ask(prompt, 8)])[0].tokens


def test_small_pool_serves_more_at_once_and_preempts_nobody(
    engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """60 blocks: one uncompressed prompt of 1,000 tokens (32), or that and some compressed ones (3 to 5 each)."""
    engine = engine_named("small-pool")
    asks = [Ask(prompt_of(1000, seed), 60, {"kv_budget": 64, "kv_policy": POLICIES[seed % 3]}) for seed in range(10)]
    plain = engine.ask([Ask(ask.prompt, 60) for ask in asks[:4]])
    assert engine.max_running == 1 and len(plain) == 4
    answers = engine.ask(asks)
    assert engine.max_running >= 5, engine.max_running
    assert all(answer.report["mode"] == "calidrop" for answer in answers)
    assert not any(answer.preempted_at for answer in answers)
    assert_equal_to_reference(asks, answers, [reference(ask) for ask in asks])
    engine.assert_nothing_in_use()


def test_preemption_and_resume(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    """Plain and compressed sequences grow until the pool is full. A replay runs with full attention, so the answer is
    that of the reference preempted at the same token; the same number of prompt tokens is kept as before."""
    engine = engine_named("small-pool")
    # SnapKV scores of half of them tie on this prompt, so the others go by position.
    how = ({}, {"kv_budget": 96}, {}, {"kv_budget": 96, "kv_policy": "streaming_llm"})
    asks = [Ask(prompt_of(200, seed), 230, how[seed % 4]) for seed in range(8)]
    answers = engine.ask(asks, **MAY_STOP)
    engine.assert_nothing_in_use()
    hit = [i for i, answer in enumerate(answers) if answer.preempted_at and asks[i].settings]
    assert hit, "nobody compressed was preempted: the test proves nothing"
    chosen = [i for i, answer in enumerate(answers) if len(answer.preempted_at) <= 1]
    assert set(chosen) & set(hit)
    expected = [reference(asks[i], resume_at=next(iter(answers[i].preempted_at), None)) for i in chosen]
    assert_equal_to_reference([asks[i] for i in chosen], [answers[i] for i in chosen], expected)
    for i in hit:
        assert answers[i].report["kept"] == 96
        assert answers[i].report["evicted"] == len(asks[i].prompt) - 96


@pytest.mark.parametrize("name", ["small-pool", "block16-chunk100"])
def test_aborts_at_any_moment_leave_nothing(name: str, engine_named: Callable[[str], Engine]) -> None:
    engine, rng = engine_named(name), random.Random(5)
    asks = mixed_asks(24, seed=3, max_tokens=30)
    for index, ask in enumerate(asks):
        engine.submit(f"abort{index}", ask)
    alive = {f"abort{index}" for index in range(len(asks))}
    for outputs in engine.steps():
        alive -= {output.request_id for output in outputs if output.finished}
        if alive and rng.random() < 0.4:
            victim = rng.choice(sorted(alive))
            engine.llm.llm_engine.abort_request([victim])
            alive.discard(victim)
    engine.assert_nothing_in_use()


def test_full_swap_pool_keeps_full_kv_or_evicts(
    engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    engine = engine_named("block32-whole")
    ledger = engine.scheduler.calidrop
    whole, counted = ledger.ids.swap, ledger.totals.fallbacks["swap_full"]
    ledger.ids.swap = FreeList(8)  # two prompts of 500 evicted to 64 need four blocks each
    try:
        for on_full, mode in (("full", "full"), ("evict", "evict")):
            asks = [Ask(prompt_of(500, seed), 12, {"kv_budget": 64, "kv_on_full": on_full}) for seed in range(5)]
            answers = engine.ask(asks)
            assert [answer.report["mode"] for answer in answers] == ["calidrop"] * 2 + [mode] * 3
            assert [answer.report["reason"] for answer in answers] == [None] * 2 + ["swap_full"] * 3
            told = [
                ask if answer.report["mode"] == "calidrop"
                else Ask(ask.prompt, 12, {} if mode == "full" else {"kv_budget": 64, "kv_calibration": False})
                for ask, answer in zip(asks, answers, strict=True)
            ]  # fmt: skip
            assert_equal_to_reference(told, answers, [reference(ask) for ask in told])
        assert ledger.totals.fallbacks["swap_full"] == counted + 6
        engine.assert_nothing_in_use()
    finally:
        ledger.ids.swap = whole


def test_n_logprobs_and_seeds(engine_named: Callable[[str], Engine]) -> None:
    """Children of one request are sequences of their own; sampling repeats with its seed."""
    from vllm.sampling_params import RequestOutputKind

    engine = engine_named("block32-whole")
    ask = Ask(prompt_of(300, seed=1), 10, {"kv_budget": 64})
    tokens = []
    for _ in range(2):
        engine.submit("n", ask, n=3, temperature=0.8, seed=11, logprobs=2, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [output for step in engine.steps() for output in step if output.finished]
        (output,) = outputs
        assert [c.calidrop["kept"] for c in output.outputs] == [64, 64, 64]
        assert all(len(c.logprobs) == 10 and len(c.logprobs[0]) >= 2 for c in output.outputs)
        tokens.append([list(c.token_ids) for c in output.outputs])
    assert tokens[0] == tokens[1]
    engine.assert_nothing_in_use()
