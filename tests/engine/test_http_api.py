"""The OpenAI routes of a served engine: refusals name the field, and every shape of response carries the report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

BUDGET = 24
REPORT_KEYS = {
    "prompt_tokens",
    "kept",
    "evicted",
    "mode",
    "reason",
    "codec",
    "recomputes",
    "merges",
    "plain",
    "group_reads",
    "pages_read",
    "skipped",
    "nonfinite",
    "bytes_read",
}
LONG = list(range(10, 90))
LONGER = list(range(10, 130))
TEXT = " ".join(f"w{i}" for i in range(80))

# (name, value): each alone is an error on every route.
BAD = [
    ("kv_budget", 0),
    ("kv_budget", -5),
    ("kv_budget", 1.5),
    ("kv_budget", "128"),
    ("kv_budget", True),
    ("kv_budget", 10**30),
    ("kv_policy", "lru"),
    ("kv_policy", 3),
    ("kv_theta1", 2.5),
    ("kv_theta1", -3.0),
    ("kv_theta2", 0.1),
    ("kv_theta2", True),
    ("kv_gate", "any"),
    ("kv_calibration", "yes"),
    ("kv_calibration_size", -1),
    ("kv_on_full", "crash"),
    ("kv_window", 0),
    ("kv_pool_kernel", 4),
    ("kv_sinks", -1),
    ("kv_codec", "int3"),
    ("kv_read_budget", -1),
    ("calidrop", 1),
]
BAD_ONLY_TOP_LEVEL = [
    ("kv_budget", [128]),
    ("kv_budget", {"tokens": 128}),
    ("kv_window", None),
    ("calidrop", {}),
]
ROUTES = ["completions", "chat/completions", "responses"]


def body_of(route: str, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": fields.pop("model"), "temperature": 0}
    if route == "completions":
        body |= {"prompt": LONG, "max_tokens": 4, "ignore_eos": True}
    elif route == "chat/completions":
        body |= {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4, "ignore_eos": True}
    else:
        body |= {"input": TEXT, "max_output_tokens": 4, "ignore_eos": True}
    return body | fields


@pytest.fixture(scope="module")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    return http.get("/v1/models").json()["data"][0]["id"]


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def refused(response: httpx.Response, name: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == name, error
    assert name in error["message"]


def assert_reports(reports: Any, prompts: list[int], budget: int | None = BUDGET) -> None:
    assert isinstance(reports, list)
    assert [report["prompt_tokens"] for report in reports] == prompts
    for report, prompt in zip(reports, prompts, strict=True):
        assert set(report) >= REPORT_KEYS
        kept = prompt if budget is None else min(prompt, budget)
        assert (report["kept"], report["evicted"]) == (kept, prompt - kept)


def chunks_of(http: httpx.Client, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", f"/v1/{route}", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    if route != "responses":
        assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Refusals


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value"), BAD + BAD_ONLY_TOP_LEVEL)
def test_bad_value_at_top_level(
    http: httpx.Client, model: str, route: str, stream: bool, name: str, value: Any
) -> None:
    refused(http.post(f"/v1/{route}", json=body_of(route, model=model, stream=stream, **{name: value})), name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_in_xargs(http: httpx.Client, model: str, route: str, stream: bool, name: str, value: Any) -> None:
    body = body_of(route, model=model, stream=stream, vllm_xargs={name: value})
    refused(http.post(f"/v1/{route}", json=body), name)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 400])
@pytest.mark.parametrize("route", ROUTES)
def test_number_that_is_none(http: httpx.Client, model: str, route: str, literal: str) -> None:
    text = json.dumps(body_of(route, model=model))[:-1] + f', "kv_theta1": {literal}}}'
    headers = {"content-type": "application/json"}
    refused(http.post(f"/v1/{route}", content=text, headers=headers), "kv_theta1")


@pytest.mark.parametrize("route", ROUTES)
def test_combinations(http: httpx.Client, model: str, route: str) -> None:
    response = http.post(f"/v1/{route}", json=body_of(route, model=model, kv_theta1=2, kv_theta2=0.85))
    refused(response, "kv_theta1")
    assert "kv_theta2" in response.json()["error"]["message"]
    refused(http.post(f"/v1/{route}", json=body_of(route, model=model, kv_budget=16, kv_window=17)), "kv_window")
    refused(http.post(f"/v1/{route}", json=body_of(route, model=model, kv_budget=16, kv_sinks=17)), "kv_sinks")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_settings_that_were_sent_the_wrong_way(http: httpx.Client, model: str, route: str, stream: bool) -> None:
    """A literal `extra_body`, and names in another case: vLLM alone would ignore both and keep full KV."""
    for inside in ({"kv_budget": 64}, {"vllm_xargs": {"kv_budget": 64}}, {"KV_BUDGET": 64}):
        response = http.post(f"/v1/{route}", json=body_of(route, model=model, stream=stream, extra_body=inside))
        refused(response, "extra_body")
        assert "top-level fields of the JSON body" in response.json()["error"]["message"]
    for fields in ({"KV_BUDGET": 64}, {"vllm_xargs": {"KV_BUDGET": 64}}):
        response = http.post(f"/v1/{route}", json=body_of(route, model=model, stream=stream, **fields))
        refused(response, "KV_BUDGET")
        assert "send kv_budget" in response.json()["error"]["message"]
    assert http.post(f"/v1/{route}", json=body_of(route, model=model, extra_body={"other": 1})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_half_of_a_surrogate_pair(http: httpx.Client, model: str, route: str, stream: bool) -> None:
    field, content = {
        "completions": ("prompt", "half \ud83d of a pair"),
        "chat/completions": ("messages", [{"role": "user", "content": "half \ud83d of a pair"}]),
        "responses": ("input", "half \ud83d of a pair"),
    }[route]
    body = json.dumps(body_of(route, model=model, stream=stream) | {field: content})
    refused(http.post(f"/v1/{route}", content=body, headers={"content-type": "application/json"}), field)


@pytest.mark.parametrize("route", ROUTES)
def test_theta1_alone_is_enough(http: httpx.Client, model: str, route: str) -> None:
    """2 is above the default of theta2, which follows: evicted KV is read at every step, which equals full KV."""
    answer = http.post(f"/v1/{route}", json=body_of(route, model=model, kv_budget=24, kv_theta1=2)).json()
    (report,) = answer["calidrop"]
    assert report["recomputes"] > 0 and report["merges"] == report["plain"] == 0


@pytest.mark.parametrize("route", ROUTES)
def test_given_twice(http: httpx.Client, model: str, route: str) -> None:
    same = body_of(route, model=model, kv_budget=BUDGET, vllm_xargs={"kv_budget": BUDGET})
    response = http.post(f"/v1/{route}", json=same)
    assert response.status_code == 200, response.text
    refused(http.post(f"/v1/{route}", json=same | {"vllm_xargs": {"kv_budget": BUDGET + 1}}), "kv_budget")
    refused(
        http.post(f"/v1/{route}", json=same | {"kv_budget": 1, "vllm_xargs": {"kv_budget": True}}),
        "kv_budget",
    )


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_beam_search_is_refused_with_a_budget_only(http: httpx.Client, model: str, route: str) -> None:
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 2}
    refused(http.post(f"/v1/{route}", json=body_of(route, model=model, kv_budget=BUDGET, **beams)), "kv_budget")
    response = http.post(f"/v1/{route}", json=body_of(route, model=model, **beams))
    assert response.status_code == 200, response.text


def test_other_routes(http: httpx.Client, model: str) -> None:
    message = {"role": "user", "content": TEXT}
    batch = {"model": model, "messages": [[message], [message]], "max_tokens": 3, "temperature": 0}
    refused(http.post("/v1/chat/completions/batch", json=batch | {"kv_budget": 0}), "kv_budget")
    answer = http.post("/v1/chat/completions/batch", json=batch | {"kv_budget": BUDGET, "kv_calibration": True})
    assert answer.status_code == 200, answer.text
    prompt = answer.json()["usage"]["prompt_tokens"] // 2
    assert_reports(answer.json()["calidrop"], [prompt, prompt])

    # vLLM streams no batches: it passes over `stream` and answers whole.
    whole = http.post("/v1/chat/completions/batch", json=batch | {"kv_budget": BUDGET, "stream": True})
    assert_reports(whole.json()["calidrop"], [prompt, prompt])


@pytest.mark.parametrize("budget", [BUDGET, None])
def test_messages(http: httpx.Client, model: str, budget: int | None) -> None:
    """Anthropic's route, whose response vLLM translates from a chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 3}
    for stream in (False, True):
        response = http.post("/v1/messages", json=body | {"kv_budget": 0, "stream": stream})
        assert response.status_code == 400
        assert "kv_budget" in response.text
    answer = http.post("/v1/messages", json=body | {"kv_budget": budget})
    assert answer.status_code == 200, answer.text
    assert answer.json()["type"] == "message" and answer.json()["content"]
    prompt = answer.json()["usage"]["input_tokens"] + answer.json()["usage"].get("cache_read_input_tokens", 0)
    assert_reports(answer.json()["calidrop"], [prompt], budget)

    with http.stream("POST", "/v1/messages", json=body | {"kv_budget": budget, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in events] and names[-2:] == ["message_delta", "message_stop"]
    assert [event["type"] for event in events if "calidrop" in event] == ["message_delta"]
    assert_reports(events[-2]["calidrop"], [prompt], budget)


def test_token_route(http: httpx.Client, model: str) -> None:
    body = {"model": model, "token_ids": LONG, "sampling_params": {"max_tokens": 2, "temperature": 0}}
    if http.post("/inference/v1/generate", json=body).status_code in (403, 404):
        pytest.skip("this server does not offer the route")
    refused(http.post("/inference/v1/generate", json=body | {"kv_budget": BUDGET}), "kv_budget")
    for stream in (False, True):
        bad = body | {"stream": stream, "sampling_params": {"max_tokens": 2, "extra_args": {"kv_budget": 0}}}
        refused(http.post("/inference/v1/generate", json=bad), "kv_budget")


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_gets_its_own_exception(client: openai.OpenAI, model: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model=model, prompt=LONG, stream=stream, extra_body={"kv_budget": 0})
    assert refusal.value.param == "kv_budget"
    answer = client.completions.create(
        model=model, prompt=LONG, max_tokens=2, temperature=0, extra_body={"kv_budget": BUDGET}
    )
    assert_reports(answer.model_extra["calidrop"], [len(LONG)])


@pytest.mark.parametrize("name", ["kv_transfer_params"])
def test_names_of_vllm_pass(http: httpx.Client, model: str, name: str) -> None:
    response = http.post("/v1/completions", json=body_of("completions", model=model, **{name: None}))
    assert response.status_code == 200, response.text


def test_unrelated_unknown_fields_are_ignored_as_before(http: httpx.Client, model: str) -> None:
    response = http.post("/v1/completions", json=body_of("completions", model=model, something_else=1))
    assert response.status_code == 200, response.text


# Reports


def test_completion(http: httpx.Client, model: str) -> None:
    answer = http.post("/v1/completions", json=body_of("completions", model=model, kv_budget=BUDGET)).json()
    assert_reports(answer["calidrop"], [len(LONG)])
    assert answer.get("kv_transfer_params") is None


def test_no_budget_is_reported_too(http: httpx.Client, model: str) -> None:
    for fields in ({}, {"kv_budget": None}):
        answer = http.post("/v1/completions", json=body_of("completions", model=model, **fields)).json()
        assert_reports(answer["calidrop"], [len(LONG)], budget=None)


def test_budget_in_xargs(http: httpx.Client, model: str) -> None:
    xargs = {"kv_budget": BUDGET, "kv_calibration": False, "kv_theta2": 1}
    answer = http.post("/v1/completions", json=body_of("completions", model=model, vllm_xargs=xargs)).json()
    assert_reports(answer["calidrop"], [len(LONG)])


def test_two_prompts_times_two_choices(http: httpx.Client, model: str) -> None:
    body = body_of("completions", model=model, prompt=[LONG, LONGER], n=2, temperature=1, seed=1, kv_budget=BUDGET)
    prompts = [len(LONG)] * 2 + [len(LONGER)] * 2
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert_reports(answer["calidrop"], prompts)
    chunks = chunks_of(http, "completions", body)
    assert_reports(chunks[-1]["calidrop"], prompts)
    assert not any("calidrop" in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_stream_reports_on_its_last_chunk(http: httpx.Client, model: str, route: str, n: int, usage: bool) -> None:
    fields: dict[str, Any] = {"n": n, "temperature": 1, "seed": 3, "kv_budget": BUDGET, "max_tokens": 6}
    if usage:
        fields["stream_options"] = {"include_usage": True}
    chunks = chunks_of(http, route, body_of(route, model=model, **fields))
    assert not any("calidrop" in chunk for chunk in chunks[:-1])
    assert bool(chunks[-1].get("usage")) == usage
    prompt = chunks[-1]["usage"]["prompt_tokens"] if usage else None
    reports = chunks[-1]["calidrop"]
    assert_reports(reports, [prompt or reports[0]["prompt_tokens"]] * n)
    finished = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in finished) == list(range(n))


def test_chat(http: httpx.Client, model: str) -> None:
    body = body_of("chat/completions", model=model, kv_budget=BUDGET, n=2, temperature=1, seed=5)
    answer = http.post("/v1/chat/completions", json=body).json()
    assert_reports(answer["calidrop"], [answer["usage"]["prompt_tokens"]] * 2)


def test_responses(http: httpx.Client, model: str) -> None:
    body = body_of("responses", model=model, kv_budget=BUDGET)
    answer = http.post("/v1/responses", json=body).json()
    assert_reports(answer["calidrop"], [answer["usage"]["input_tokens"]])
    events = chunks_of(http, "responses", body)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert_reports(events[-1]["response"]["calidrop"], [answer["usage"]["input_tokens"]])
    assert "calidrop" not in events[0]["response"]


def test_openai_client_streams(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=3,
        stream=True,
        extra_body={"kv_budget": BUDGET, "ignore_eos": True},
    )
    last = list(stream)[-1]
    assert last.model_extra is not None
    assert_reports(last.model_extra["calidrop"], [last.model_extra["calidrop"][0]["prompt_tokens"]])


def test_aborted_by_the_server(http: httpx.Client, model: str) -> None:
    def abort(name: str) -> httpx.Response:
        return http.post("/inference/v1/abort_requests", json={"request_ids": [f"cmpl-{name}-0"]})

    if abort("nobody").status_code != 200:
        pytest.skip("this server does not offer the route")
    body = body_of("completions", model=model, kv_budget=BUDGET, max_tokens=900)

    headers = {"X-Request-Id": "streamed"}
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=headers) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        next(lines)
        abort("streamed")
        last, done = list(lines)[-2:]
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "abort"
    assert_reports(json.loads(last)["calidrop"], [len(LONG)])

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/v1/completions", json=body, headers={"X-Request-Id": "whole"})
        while not answer.done():
            time.sleep(0.2)
            abort("whole")
    aborted = answer.result().json()
    assert aborted["choices"][0]["finish_reason"] == "abort"
    # Null when the abort came before the engine's first answer.
    if aborted["calidrop"] != [None]:
        assert_reports(aborted["calidrop"], [len(LONG)])


def test_server_still_serves_after_a_client_left(http: httpx.Client, model: str) -> None:
    body = body_of("completions", model=model, kv_budget=BUDGET, max_tokens=400, stream=True)
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert http.get("/health").status_code == 200
    answer = http.post("/v1/completions", json=body_of("completions", model=model, kv_budget=BUDGET)).json()
    assert_reports(answer["calidrop"], [len(LONG)])
