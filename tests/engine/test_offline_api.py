"""Requests through `LLM`: the record that reaches the scheduler, and the report on every completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.harness import Engine
from vllm_calidrop.settings.defaults import VersionedSettings
from vllm_calidrop.settings.request import RequestSettings
from vllm_calidrop.settings.server import ServerSettings

pytestmark = pytest.mark.engine

BUDGET = 24
PROMPTS = [{"prompt_token_ids": list(range(10, 10 + length))} for length in (50, 80)]


@pytest.fixture(scope="module")
def engine(engine_named: Callable[[str], Engine]) -> Engine:
    return engine_named("block32-whole")


@pytest.fixture
def records(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`extra_args` of every request that reaches the scheduler."""
    seen: list[dict[str, Any]] = []
    add_request = engine.scheduler.add_request

    def watched(request: Any) -> None:
        seen.append(request.sampling_params.extra_args)
        add_request(request)

    monkeypatch.setattr(engine.scheduler, "add_request", watched)
    return seen


@pytest.fixture
def default_budget(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ServerSettings.from_additional_config({"calidrop": {"kv_budget": BUDGET}})
    versioned = VersionedSettings(1, server)
    monkeypatch.setattr(engine.llm.llm_engine.input_processor, "calidrop_server_settings", versioned)
    yield


def generate(engine: Engine, extra_args: dict[str, Any] | None, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    params = SamplingParams(**(options | sampling), extra_args=extra_args)
    before = None if extra_args is None else dict(extra_args)
    answers = engine.llm.generate(PROMPTS, params, use_tqdm=False)
    assert params.extra_args == before, "the caller's parameters stay as they were"
    return answers


def kept(answers: list[Any]) -> list[list[tuple[int, int]]]:
    for answer in answers:
        assert answer.kv_transfer_params is None
    return [[(out.calidrop["kept"], out.calidrop["evicted"]) for out in answer.outputs] for answer in answers]


def test_every_prompt_and_every_child(engine: Engine, records: list[dict[str, Any]]) -> None:
    assert kept(generate(engine, {"kv_budget": BUDGET})) == [[(24, 26)], [(24, 56)]]
    many = generate(engine, {"kv_budget": BUDGET}, n=3, temperature=1.0, seed=0)
    assert kept(many) == [[(24, 26)] * 3, [(24, 56)] * 3]
    assert len(records) == 2 + 6
    for extra_args in records:
        assert RequestSettings.from_record(extra_args["calidrop_settings"]).kv_budget == BUDGET


def test_no_budget_has_a_record_too(engine: Engine, records: list[dict[str, Any]]) -> None:
    assert kept(generate(engine, None)) == [[(50, 0)], [(80, 0)]]
    assert kept(generate(engine, {"kv_budget": None, "mine": 1})) == [[(50, 0)], [(80, 0)]]
    assert [extra_args["calidrop_settings"]["kv_budget"] for extra_args in records] == [None] * 4
    assert records[-1]["mine"] == 1


def test_counters_are_of_the_whole_answer(engine: Engine) -> None:
    ask = {"kv_budget": BUDGET, "kv_theta1": 2, "kv_theta2": 2}
    few, more = (generate(engine, ask, max_tokens=length)[0].outputs[0].calidrop for length in (2, 5))
    assert few["recomputes"] > 0
    assert more["recomputes"] == 4 * few["recomputes"], "one decision per decode step; the first token is the prefill's"


@pytest.mark.usefixtures("default_budget")
def test_server_default(engine: Engine) -> None:
    assert kept(generate(engine, None)) == [[(24, 26)], [(24, 56)]]
    assert kept(generate(engine, {"kv_budget": None})) == [[(50, 0)], [(80, 0)]]
    assert kept(generate(engine, {"kv_budget": 60})) == [[(50, 0)], [(60, 20)]]


@pytest.mark.usefixtures("default_budget")
def test_beam_search_is_refused_under_a_default_budget(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError) as refusal:
        engine.llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=2))
    assert refusal.value.parameter == "kv_budget"


def test_beam_search_without_a_budget(engine: Engine) -> None:
    from vllm.sampling_params import BeamSearchParams

    assert len(engine.llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=2))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("extra_args", "name"),
    [
        ({"kv_budget": 0}, "kv_budget"),
        ({"kv_codec": 1}, "kv_codec"),
        ({"calidrop": {}}, "calidrop"),
        ({"calidrop_settings": {}}, "calidrop_settings"),
    ],
)
def test_refused_and_nothing_left_behind(engine: Engine, extra_args: dict[str, Any], name: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as refusal:
        generate(engine, extra_args)
    assert refusal.value.parameter == name
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert kept(generate(engine, {"kv_budget": BUDGET})) == [[(24, 26)], [(24, 56)]]


def test_stock_backend_ignores_the_names(engine_named: Callable[[str], Engine]) -> None:
    for extra_args in (None, {"kv_budget": BUDGET}, {"kv_budget": "nonsense", "calidrop": 1}):
        for answer in generate(engine_named("stock"), extra_args):
            assert answer.outputs[0].calidrop is None
