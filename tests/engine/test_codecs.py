"""Codecs and read budgets end to end: tokens and counts of the engine against the independent reference (fp32)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.cases import POLICIES, CachedReference, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.reference.codecs import CODECS, read_bytes, read_page_bytes

pytestmark = pytest.mark.engine

LAYERS, KV_HEADS, HEAD_DIM, ITEM = 4, 2, 64, 4
PAGES = {"kv_recall": "pages"}


def one_group(prompt: list[int], codec: str) -> int:
    """The read budget that lets every layer read one of its two KV heads."""
    return LAYERS * read_bytes(codec, len(prompt) - 64, HEAD_DIM, ITEM)


def asks() -> list[Ask]:
    """Every codec, runs longer and shorter than a block of theirs, all policies, by pages too; all in one batch."""
    found = []
    for seed, codec in enumerate(CODECS):
        how: dict[str, Any] = {"kv_codec": codec, "kv_policy": POLICIES[seed % 3], "kv_budget": 64, "kv_theta1": 0.8}
        prompt = prompt_of((960, 150, 517)[seed % 3], seed)
        found += [Ask(prompt, 12, how), Ask(prompt, 12, {**how, **PAGES, "kv_recall_buffer": 4 * (seed % 2)})]
    return found


def budgeted() -> list[Ask]:
    found = []
    for seed, (codec, gate) in enumerate([("none", "group"), ("int8", "head"), ("int4", "group_mean")]):
        prompt = prompt_of(500, 10 + seed)
        how: dict[str, Any] = {"kv_codec": codec, "kv_gate": gate, "kv_budget": 64, "kv_theta1": 0.8}
        one = one_group(prompt, codec)
        found += [Ask(prompt, 12, {**how, "kv_read_budget": bytes_}) for bytes_ in (0, one - 1, one, 2 * one)]
        page = LAYERS * read_page_bytes(codec, HEAD_DIM, ITEM)
        for count, buffer in ((0, 0), (1, 0), (3, 4)):
            settings = {**how, **PAGES, "kv_recall_buffer": buffer, "kv_read_budget": count * page}
            found.append(Ask(prompt, 12, settings))
    return found


def test_codecs_equal_the_reference(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    engine = engine_named("block32-whole")
    answers = engine.ask(asks())
    assert_equal_to_reference(asks(), answers, [reference(ask) for ask in asks()])
    engine.assert_nothing_in_use()
    for ask, answer in zip(asks(), answers, strict=True):
        codec, report = ask.settings["kv_codec"], answer.report
        assert report is not None and report["codec"] == codec
        if ask.settings.get("kv_recall"):
            assert report["bytes_read"] == report["pages_read"] * read_page_bytes(codec, HEAD_DIM, ITEM) > 0
        else:
            whole = read_bytes(codec, report["evicted"], HEAD_DIM, ITEM)
            assert report["bytes_read"] == report["group_reads"] * whole > 0


def test_read_budgets_equal_the_reference(engine_named: Callable[[str], Engine], reference: CachedReference) -> None:
    """Also alone and in chunks: a budget is the sequence's own, so neighbours change nothing."""
    expected = [reference(ask) for ask in budgeted()]
    answers = engine_named("block32-whole").ask(budgeted())
    assert_equal_to_reference(budgeted(), answers, expected)
    for ask, answer in zip(budgeted(), answers, strict=True):
        report = answer.report
        assert report is not None
        steps = len(answer.tokens) - 1
        assert report["bytes_read"] <= steps * ask.settings["kv_read_budget"]
    assert sum(sum(result.skipped) for result in expected) > 100
    some = slice(2, None, 4)
    assert_equal_to_reference(
        budgeted()[some], engine_named("block16-chunk100").ask_alone(budgeted()[some]), expected[some]
    )


def test_evicted_kv_that_is_not_finite(engine_named: Callable[[str], Engine]) -> None:
    """What a codec refuses leaves its head plain for the rest of the answer: counted, and nothing is kept for ever."""
    engine = engine_named("block32-whole")
    operators = engine.worker.calidrop.operators
    take, layer_of_call = operators.take, itertools.count()

    def spoilt(cache: Any, blocks: Any, positions: Any, codec: Any, out: Any) -> Any:
        """One call per layer: so few tokens are one part."""
        keys, values = take(cache, blocks, positions)
        if next(layer_of_call) % LAYERS == 1:
            keys[0, 7, 3] = torch.nan
        encoded = codec.encode(keys, values)
        out.copy_(encoded.blocks.transpose(0, 1))
        return encoded.refused

    operators.pack = spoilt
    try:
        for how in ({"kv_theta1": 2, "kv_theta2": 2}, PAGES):
            ask = Ask(prompt_of(400, 3), 8, {"kv_budget": 64, "kv_codec": "int4", **how})
            report = engine.ask([ask])[0].report
            assert report is not None and report["nonfinite"] == 1
            assert report["layers"]["nonfinite"] == [0, 1, 0, 0]
            if how is not PAGES:
                assert report["layers"]["group_reads"] == [14, 7, 14, 14]
                assert report["layers"]["plain"] == [0, 14, 0, 0]
    finally:
        del operators.pack
    engine.assert_nothing_in_use()


def test_nothing_leaks_when_requests_are_aborted(engine_named: Callable[[str], Engine]) -> None:
    engine = engine_named("block16-chunk100")
    rng = random.Random(5)
    for index, ask in enumerate(asks()):
        engine.submit(f"gone{index}", ask)
    alive = {f"gone{index}" for index in range(len(asks()))}
    for outputs in engine.steps():
        alive -= {output.request_id for output in outputs if output.finished}
        if alive and rng.random() < 0.4:
            victim = rng.choice(sorted(alive))
            engine.llm.llm_engine.abort_request([victim])
            alive.discard(victim)
    engine.assert_nothing_in_use()
