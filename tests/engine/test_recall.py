"""Recall by pages: tokens, looks and pages read of the engine against the independent reference (fp32)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.cases import POLICIES, CachedReference, prompt_of
from tests.engine.harness import MAY_STOP, Ask, Engine, assert_equal_to_reference, difference, too_close
from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.scheduler.ids import FreeList

pytestmark = pytest.mark.engine
ENGINES = ("block32-whole", "block16-chunk100", "block128-chunk64")

PAGES = {"kv_recall": "pages"}
RECALL: tuple[dict[str, Any], ...] = (
    {},
    {"kv_recall_buffer": 4},
    {"kv_recall_top_p": 0.95},
    {"kv_recall_top_p": 0.9, "kv_recall_buffer": 4},
    {"kv_recall_theta": 0.5, "kv_recall_pages": 2},
    {"kv_recall_theta": 2.0, "kv_recall_eps": 0.2, "kv_recall_pages": 9},
    {"kv_recall_buffer": 2, "kv_recall_eps": 0.01, "kv_recall_theta": 0.6},
    {"kv_recall_theta": -2.0},
    {"kv_recall_buffer": 7, "kv_recall_theta": -2.0},
    {"kv_recall_rest": "v2"},
    {"kv_recall_rest": "v1", "kv_recall_buffer": 3, "kv_recall_eps": 0.02},
    {"kv_recall_rest": "v2", "kv_recall_theta": 0.9, "kv_recall_top_p": 0.5},
)


def asks_of(seed: int = 0, max_tokens: int = 20) -> list[Ask]:
    """Every way to recall with every policy, and requests that recall everything or nothing among them."""
    rng = random.Random(seed)
    asks = []
    for recall in RECALL:
        for policy in POLICIES:
            settings = {"kv_policy": policy, "kv_budget": rng.choice((32, 64, 128)), **PAGES, **recall}
            asks.append(
                Ask(prompt_of(rng.choice((150, 330, 517, 1000)), seed=1000 * seed + len(asks)), max_tokens, settings)
            )
    others: tuple[dict[str, Any], ...] = ({}, {"kv_budget": 64}, {"kv_budget": 64, "kv_calibration": False, **PAGES})
    return asks + [Ask(prompt_of(400, seed=seed + i), max_tokens, settings) for i, settings in enumerate(others)]


@pytest.mark.parametrize("name", ENGINES)
def test_equal_to_the_reference(name: str, engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    engine, asks = engine_named(name), asks_of()
    assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
    engine.assert_nothing_in_use()


def test_every_branch_is_taken(reference: CachedReference) -> None:
    results = [reference(ask) for ask in asks_of()]
    for name in ("recomputes", "merges", "plain", "pages_read"):
        assert sum(sum(getattr(result, name)) for result in results) > 50, name


def test_alone_as_among_neighbours(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    engine, asks = engine_named("block16-chunk100"), asks_of(seed=1)[::4]
    assert_equal_to_reference(asks, engine.ask_alone(asks), [reference(ask) for ask in asks])


@pytest.mark.parametrize("policy", POLICIES)
def test_calibration_size_and_short_pages(
    policy: str, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    """Only some evicted tokens are stored: fewer than a page, a page, a page and a token; and one evicted token.

    Which of them is often decided between tied scores, so more prompts than elsewhere may differ there.
    """
    asks = [
        Ask(
            prompt_of(400, seed),
            12,
            {"kv_policy": policy, "kv_budget": 48, "kv_calibration_size": size, **PAGES, **how},
        )
        for seed, size in enumerate((0, 1, 15, 16, 17, 100, 5000))
        for how in RECALL[:3]
    ]
    asks += [Ask(prompt_of(200, seed=7)[:65], 10, {"kv_budget": 64, "kv_policy": policy, **PAGES, **RECALL[1]})]
    answers = engine_named("block32-whole").ask(asks)
    expected = [reference(ask) for ask in asks]
    differs = [difference(*each) for each in zip(asks, answers, expected, strict=True)]
    assert not [what for what, result in zip(differs, expected) if what and not too_close(result)]
    assert differs.count(None) >= 0.75 * len(asks), differs


@pytest.mark.parametrize(
    "choice",
    [
        {"kv_recall_eps": 0.0, "kv_recall_pages": 1000},
        {"kv_recall_top_p": 1.0},
        {"kv_recall_eps": 0.0, "kv_recall_rest": "v1"},
    ],
)
@pytest.mark.parametrize("buffer", [0, 64])
def test_every_page_at_every_step_equals_full_kv(
    choice: dict[str, Any], buffer: int, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    engine = engine_named("block32-whole")
    prompts = [prompt_of(random.Random(seed).randrange(200, 900), seed) for seed in range(24)]
    full = [Ask(prompt, 12) for prompt in prompts]
    whole = {"kv_recall_theta": 2.0, "kv_recall_buffer": buffer, "kv_recall_pages": 1000, **PAGES, **choice}
    asks = [
        Ask(prompt, 12, {"kv_budget": 64, "kv_policy": POLICIES[i % 3], **whole}) for i, prompt in enumerate(prompts)
    ]
    differing = [
        i for i, (a, b) in enumerate(zip(engine.ask(asks), engine.ask(full), strict=True)) if a.tokens != b.tokens
    ]
    assert all(too_close(reference(full[i])) for i in differing), differing
    assert len(differing) <= 1


def test_bytes_are_those_of_whole_pages(engine_named: Callable[[str], Engine]) -> None:
    engine = engine_named("block32-whole")
    prompt = prompt_of(600, seed=3)
    by_pages, all_of_it = engine.ask([Ask(prompt, 12, {"kv_budget": 64, **how}) for how in (PAGES, {})])
    page_bytes = PAGE_TOKENS * 2 * 64 * 4
    assert by_pages.report["bytes_read"] == by_pages.report["pages_read"] * page_bytes > 0
    stored = all_of_it.report["evicted"]
    assert all_of_it.report["pages_read"] == all_of_it.report["group_reads"] * -(-stored // PAGE_TOKENS)
    assert all_of_it.report["bytes_read"] == all_of_it.report["group_reads"] * stored * 2 * 64 * 4
    assert 10 * by_pages.report["bytes_read"] < all_of_it.report["bytes_read"]


def test_prefix_hits(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    """The mean of the prompt's keys and the sketch come from blocks that another request filled; the queries that
    balance it are computed again."""
    engine = engine_named("block32-whole")
    prompt = prompt_of(900, seed=902)
    engine.ask([Ask(prompt, 4)])
    for policy, rest in (("snapkv", "none"), ("streaming_llm", "none"), ("streaming_llm", "v2")):
        ask = Ask(prompt, 16, {"kv_policy": policy, "kv_budget": 64, "kv_recall_rest": rest, **PAGES})
        answer = engine.ask([ask])[0]
        assert answer.cached_tokens > 0
        assert_equal_to_reference([ask], [answer], [reference(ask)])


def test_preemption_and_resume(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    engine = engine_named("small-pool")
    how = ({}, {"kv_budget": 96, **PAGES}, {"kv_budget": 96, **PAGES, "kv_recall_buffer": 4})
    asks = [Ask(prompt_of(200, seed), 230, how[seed % 3]) for seed in range(9)]
    answers = engine.ask(asks, **MAY_STOP)
    engine.assert_nothing_in_use()
    chosen = [i for i, answer in enumerate(answers) if len(answer.preempted_at) <= 1]
    assert [i for i in chosen if asks[i].settings and answers[i].preempted_at], "nobody who recalls was preempted"
    expected = [reference(asks[i], resume_at=next(iter(answers[i].preempted_at), None)) for i in chosen]
    assert_equal_to_reference([asks[i] for i in chosen], [answers[i] for i in chosen], expected)


@pytest.mark.parametrize("pool", ["sketches", "buffers"])
def test_full_pools_keep_full_kv_or_evict(
    pool: str, engine_named: Callable[[str], Engine], reference: CachedReference
) -> None:
    engine = engine_named("block32-whole")
    ledger = engine.scheduler.calidrop
    whole, counted = getattr(ledger.ids, pool), ledger.totals.fallbacks["recall_full"]
    setattr(ledger.ids, pool, FreeList(8))  # two sequences: four sketch blocks, four buffer pages each
    try:
        for on_full, mode in (("full", "full"), ("evict", "evict")):
            settings = {"kv_budget": 64, "kv_on_full": on_full, "kv_recall_buffer": 4, **PAGES}
            asks = [Ask(prompt_of(500, seed), 12, settings) for seed in range(5)]
            answers = engine.ask(asks)
            assert [answer.report["mode"] for answer in answers] == ["calidrop"] * 2 + [mode] * 3
            assert [answer.report["reason"] for answer in answers] == [None] * 2 + ["recall_full"] * 3
            fallback = {} if mode == "full" else {"kv_budget": 64, "kv_calibration": False}
            told = [*asks[:2], *(Ask(ask.prompt, 12, fallback) for ask in asks[2:])]
            assert_equal_to_reference(told, answers, [reference(ask) for ask in told])
        assert ledger.totals.fallbacks["recall_full"] == counted + 6
        engine.assert_nothing_in_use()
    finally:
        setattr(ledger.ids, pool, whole)
