"""Both operator sets of the CPU, in the real engine, against the reference and, reading every page, full KV."""

from __future__ import annotations

import pytest

from tests.engine.cases import MODEL, CachedReference, ask_of, covering_combinations, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.engine.test_recall import PAGES, asks_of
from vllm_calidrop.ops import registry
from vllm_calidrop.ops.cpp import build

pytestmark = pytest.mark.engine

SETS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")),
]


@pytest.mark.parametrize("operators", SETS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_equals_the_reference(
    operators: str, block_size: int, monkeypatch: pytest.MonkeyPatch, reference: CachedReference
) -> None:
    monkeypatch.setenv(registry.CHOICE_VARIABLE, operators)
    engine = Engine(MODEL, block_size=block_size)
    asks = [ask_of(combination, seed) for seed, combination in enumerate(covering_combinations())][::3]
    asks += asks_of(seed=2)[:27:4]
    full = [Ask(prompt_of(500, seed), 12) for seed in range(4)]
    every_page = {"kv_budget": 64, "kv_recall_theta": 2.0, "kv_recall_eps": 0.0, "kv_recall_pages": 1000, **PAGES}
    whole = [Ask(ask.prompt, ask.max_tokens, every_page) for ask in full]
    try:
        assert engine.worker.calidrop.operators.name == operators
        assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
        assert [answer.tokens for answer in engine.ask(whole)] == [answer.tokens for answer in engine.ask(full)]
        engine.assert_nothing_in_use()
    finally:
        engine.close()
