"""calidrop-server as a user starts it: its routes, keys, documentation and defaults beside vLLM's own server."""

from __future__ import annotations

import gzip
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode

from tests.engine.conftest import CALIDROP_SERVER, serving
from vllm_calidrop import metrics
from vllm_calidrop.settings.request import RequestSettings

pytestmark = pytest.mark.engine

KEY, ADMIN = {"Authorization": "Bearer reader"}, {"Authorization": "Bearer operator"}
# Eight swap blocks, of 128 tokens: a prompt of 500 tokens takes four.
SETTINGS = {"swap_bytes": 8 * 262144, "min_budget": 16, "max_budget": 512, "min_theta": 0.1, "max_theta": 0.95}
LONG = list(range(10, 310))
BUDGET = 24
COMPLETION: dict[str, Any] = {"prompt": LONG, "max_tokens": 6, "temperature": 0, "ignore_eos": True}


class Collector(ThreadingHTTPServer):
    """Takes what OpenTelemetry exports over HTTP. spans: attributes of every `llm_request`, by the request's id."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.spans: dict[str, dict[str, Any]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = ExportTraceServiceRequest.FromString(
            gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        )
        for span in (s for resource in sent.resource_spans for scope in resource.scope_spans for s in scope.spans):
            if span.name == "llm_request":
                of = {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}
                self.server.spans[of["gen_ai.request.id"]] = of
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collecting:
        threading.Thread(target=collecting.serve_forever, daemon=True).start()
        yield collecting
        collecting.shutdown()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[str]:
    log = tmp_path_factory.mktemp("calidrop-server") / "log"
    options = ("--enforce-eager", "--api-key", "reader", "--calidrop-admin-key", "operator")
    options += ("--calidrop-max-body-bytes", "100000", "--additional-config", json.dumps({"calidrop": SETTINGS}))
    options += ("--otlp-traces-endpoint", collector.endpoint)
    exporting = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serving(log, *options, program=CALIDROP_SERVER, **exporting) as base:
        yield base
        text = log.read_text()
        assert "Traceback" not in text, "a request that is refused is no failure of the server"
        assert "operator" not in text, "the admin key is not logged"


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers=KEY, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    return http.get("/v1/models").json()["data"][0]["id"]


def complete(http: httpx.Client, model: str, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"model": model} | COMPLETION | fields)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, status: int, field: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert error["param"] == field
    return error["message"]


def fresh_stats(http: httpx.Client) -> dict[str, Any]:
    """Statistics read after this call: what is shown may be older."""
    asked = time.monotonic()
    for _ in range(300):
        stats = http.get("/calidrop/stats").json()
        if time.monotonic() - stats["age_seconds"] > asked:
            return stats
        time.sleep(0.1)
    raise AssertionError(stats)


def test_a_traces_span_says_what_the_answer_says(http: httpx.Client, model: str, collector: Collector) -> None:
    compressed, whole = complete(http, model, kv_budget=BUDGET), complete(http, model)
    ids = [f"{answer['id']}-0" for answer in (compressed, whole)]
    for _ in range(300):
        if collector.spans.keys() >= set(ids):
            break
        time.sleep(0.1)
    for answer, request in zip((compressed, whole), ids, strict=True):
        (report,) = answer["calidrop"]
        said = {name: value for name, value in report.items() if isinstance(value, (str, int))}
        span = collector.spans[request]
        assert {k.removeprefix("calidrop."): v for k, v in span.items() if k.startswith("calidrop.")} == said
        assert span["gen_ai.usage.prompt_tokens"] == report["prompt_tokens"] == len(LONG)
    assert collector.spans[ids[0]]["calidrop.kept"] == BUDGET
    assert collector.spans[ids[1]]["calidrop.mode"] == "full"


# Keys


@pytest.mark.parametrize(
    "headers", [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "reader"}]
)
@pytest.mark.parametrize(("method", "route"), [("GET", "config"), ("GET", "stats"), ("POST", "defaults")])
def test_without_the_right_key(http: httpx.Client, method: str, route: str, headers: dict[str, str]) -> None:
    response = http.request(method, f"/calidrop/{route}", headers=headers, content=b'{"kv_budget": 1}')
    assert "Bearer KEY" in refused(response, 401)


def test_an_api_key_changes_nothing_and_the_admin_key_reads(http: httpx.Client) -> None:
    refused(http.post("/calidrop/defaults", json={"kv_budget": 1}), 401)
    for route in ("config", "stats"):
        assert http.get(f"/calidrop/{route}", headers=ADMIN).status_code == 200


# What is shown


def test_documentation_has_every_field(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    document = http.get("/openapi.json").json()
    for route in ("completions", "chat/completions", "chat/completions/batch", "responses", "messages"):
        operation = document["paths"][f"/v1/{route}"]["post"]
        response = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert response["properties"]["calidrop"]["items"]["anyOf"][0] == {
            "$ref": "#/components/schemas/CaliDropReport"
        }
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        properties = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
        for name in RequestSettings.model_fields:
            assert properties[name]["description"], name
            assert {"type", "anyOf", "enum"} & set(properties[name]), name
        assert properties["kv_theta1"]["minimum"] == -2
        assert properties["kv_theta1"]["maximum"] == 2
        assert properties["kv_theta1"]["default"] == 0.7
        assert properties["kv_policy"]["enum"] == ["snapkv", "h2o", "streaming_llm", "full"]
        assert properties["kv_budget"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    answer = http.post("/v1/completions", json=COMPLETION | {"kv_budget": BUDGET}, headers=KEY).json()
    (report,) = answer["calidrop"]
    documented = document["components"]["schemas"]["CaliDropReport"]
    assert set(report) == set(documented["properties"]) >= set(documented["required"])
    changes = document["paths"]["/calidrop/defaults"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(document["components"]["schemas"][changes["$ref"].rpartition("/")[2]]["properties"]) == set(
        RequestSettings.model_fields
    )


def test_config(http: httpx.Client, model: str) -> None:
    config = http.get("/calidrop/config").json()
    assert config["model"] == model
    assert config["max_model_len"] == 1152
    assert config["block_size"] == 32
    assert config["admin"] is True
    assert config["defaults"] == RequestSettings().to_record()
    assert config["fields"].keys() == config["defaults"].keys()


def test_held(http: httpx.Client, model: str) -> None:
    """Sizes of a request as `plan` has them: blocks of 32 tokens, and three swap blocks of 128 for 276 evicted ones."""
    asked = {"prompt_tokens": 300, "answer_tokens": 20, "mode": "calidrop", "kv_budget": BUDGET}
    told = http.post("/calidrop/held", json=asked).json()
    assert (told["full"]["tokens"], told["full"]["blocks"]) == (320, 10)
    assert (told["held"]["tokens"], told["held"]["blocks"]) == (BUDGET + 20, 10 - 276 // 32)
    assert told["held"]["bytes"] * 10 == told["full"]["bytes"] * 2
    assert told["host_bytes"] == 3 * 262144
    assert told["held"]["fit"] == 8 // 3, "the host pool of this server has eight swap blocks"
    evicted = http.post("/calidrop/held", json=asked | {"mode": "evict"}).json()
    assert evicted["host_bytes"] == 0 and evicted["held"]["fit"] > told["full"]["fit"]
    full = http.post("/calidrop/held", json=asked | {"mode": "full"}).json()
    assert full["held"] == full["full"] | {"fit": full["held"]["fit"]}
    wrong = {"prompt_tokens": -1, "answer_tokens": "many", "mode": "all", "kv_budget": 1, "kv_nonsense": 1}
    for field, value in wrong.items():
        refused(http.post("/calidrop/held", json=asked | {field: value}), 400, field)
    assert httpx.post(http.base_url.join("/calidrop/held"), json=asked).status_code == 401


def test_stats_while_a_request_runs_and_after(http: httpx.Client, model: str) -> None:
    before = fresh_stats(http)["engines"][0]
    assert before["sequences"] == []
    body = {"model": model, **COMPLETION, "max_tokens": 840, "kv_budget": BUDGET, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        request_id = json.loads(next(lines))["id"]
        next(lines)
        during = fresh_stats(http)["engines"][0]
        *_, last, done = lines  # the engine does not wait for a reader
    assert done == "[DONE]"
    (report,) = json.loads(last)["calidrop"]
    (sequence,) = during["sequences"]
    assert sequence["request_id"].startswith(request_id)
    assert 0 < sequence.pop("outputs") < 840
    assert sequence | {"request_id": ""} == {
        "request_id": "", "state": "decode", "prompt_tokens": 300, "kept": BUDGET, "evicted": 300 - BUDGET,
        "mode": "calidrop", "reason": None, "policy": "snapkv", "recall": "all", "swap_blocks": 3,
    }  # fmt: skip
    assert during["swap"]["used_blocks"] == 3
    assert during["kv_blocks"]["used"] >= 1
    assert during["kv_blocks"]["freed_total"] - before["kv_blocks"]["freed_total"] == (300 - BUDGET) // 32

    after = fresh_stats(http)["engines"][0]
    assert after["sequences"] == []
    assert after["swap"]["used_blocks"] == after["kv_blocks"]["used"] == 0
    for name, per_layer in after["layers"].items():
        own = [now - then for now, then in zip(per_layer, before["layers"][name], strict=True)]
        assert own == report["layers"][name]
    assert after["totals"]["bytes_in"] - before["totals"]["bytes_in"] == report["bytes_read"]


def test_totals_are_the_sums_of_the_reports(http: httpx.Client, model: str) -> None:
    before = fresh_stats(http)["engines"][0]
    settings: list[dict[str, Any]] = [
        {"kv_budget": 40},
        {"kv_budget": 50, "kv_calibration": False},
        {"kv_budget": 64, "kv_recall": "pages", "n": 2, "temperature": 1},
        {"kv_budget": 100, "max_tokens": 1},
        {},
    ]
    reports = [report for fields in settings for report in complete(http, model, **fields)["calidrop"]]
    after = fresh_stats(http)["engines"][0]

    def gained(total: str) -> Any:
        return after["totals"][total] - before["totals"][total]

    compacted = [report for report in reports if report["mode"] != "full"]
    assert gained("kept_tokens") == sum(report["kept"] for report in compacted)
    assert gained("evicted_tokens") == sum(report["evicted"] for report in compacted)
    assert gained("bytes_in") == sum(report["bytes_read"] for report in compacted)
    token_bytes = after["swap"]["block_bytes"] // 128
    stored = sum(report["evicted"] for report in compacted if report["mode"] == "calidrop")
    assert gained("bytes_out") == stored * token_bytes
    modes = [report["mode"] for report in reports]
    for mode, count in after["totals"]["requests_by_mode"].items():
        assert count - before["totals"]["requests_by_mode"][mode] == modes.count(mode)
    for name, per_layer in after["layers"].items():
        assert sum(per_layer) - sum(before["layers"][name]) == sum(report[name] for report in reports)


# Changing the defaults


def test_defaults_change_for_the_next_request(http: httpx.Client, model: str) -> None:
    start = http.get("/calidrop/config").json()
    assert complete(http, model)["calidrop"][0]["mode"] == "full"
    changed = http.post("/calidrop/defaults", json={"kv_budget": 50, "kv_theta2": 0.9}, headers=ADMIN).json()
    try:
        assert changed["defaults_version"] == start["defaults_version"] + 1
        assert changed["defaults"] == start["defaults"] | {
            "kv_budget": 50,
            "kv_theta2": 0.9,
            "kv_window": 25,
            "kv_sinks": 25,
        }
        assert complete(http, model)["calidrop"][0]["kept"] == 50
        assert complete(http, model, kv_budget=60)["calidrop"][0]["kept"] == 60
        assert complete(http, model, kv_budget=None)["calidrop"][0]["mode"] == "full"
        assert http.get("/calidrop/config").json()["defaults"] == changed["defaults"]
    finally:
        back = http.post("/calidrop/defaults", json={"kv_budget": None, "kv_theta2": None}, headers=ADMIN).json()
    assert back["defaults_version"] == changed["defaults_version"] + 1
    assert back["defaults"] == start["defaults"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"kv_budget": 0}', "kv_budget"),
        ('{"kv_budget": "64"}', "kv_budget"),
        ('{"kv_budget": 50, "kv_theta1": 0.9, "kv_theta2": 0.8}', "kv_theta1"),
        ('{"kv_theta1": NaN}', "kv_theta1"),
        ('{"kv_theta1": 1e999}', "kv_theta1"),
        (f'{{"kv_budget": {10**400}}}', "kv_budget"),
        ('{"kv_unknown": 1}', "kv_unknown"),
        ('{"swap_bytes": 1}', "swap_bytes"),
        ('["kv_budget"]', "body"),
        ("{", "body"),
        ("", "body"),
        ("\udcff", "body"),
    ],
)
def test_bad_defaults_change_nothing(http: httpx.Client, body: str, field: str) -> None:
    before = http.get("/calidrop/config").json()
    sent = http.post("/calidrop/defaults", content=body.encode(errors="surrogateescape"), headers=ADMIN)
    assert field in refused(sent, 400, field)
    assert http.get("/calidrop/config").json() == before


# The operator's limits


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("kv_budget", 8, "16"), ("kv_budget", 513, "512"), ("kv_theta1", 0.0, "0.1"), ("kv_theta2", 1.0, "0.95")],
)
def test_outside_of_the_limits(
    http: httpx.Client, model: str, field: str, value: float, limit: str, stream: bool
) -> None:
    body = {"model": model, **COMPLETION, "kv_budget": 64, "stream": stream, field: value}
    assert limit in refused(http.post("/v1/completions", json=body), 400, field)
    assert limit in refused(http.post("/calidrop/defaults", json={field: value}, headers=ADMIN), 400, field)
    assert http.get("/calidrop/config").json()["limits"]["max_budget"] == 512


# A full host pool


@contextmanager
def full_pool(http: httpx.Client, model: str) -> Iterator[None]:
    """Two sequences hold all swap blocks until this ends."""
    body = {"model": model, "prompt": list(range(10, 510)), "max_tokens": 640, "ignore_eos": True, "kv_budget": 16}
    with ExitStack() as streams:
        readers = []  # a reader that is dropped closes its connection
        for _ in range(2):
            stream = streams.enter_context(http.stream("POST", "/v1/completions", json=body | {"stream": True}))
            readers.append(stream.iter_lines())
            next(readers[-1])
        yield
    wait_until(http, lambda engine: engine["swap"]["used_blocks"] == 0)


def wait_until(http: httpx.Client, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(100):
        engine = fresh_stats(http)["engines"][0]
        if condition(engine):
            return engine
    raise AssertionError(engine)


def body_of(route: str, model: str, **fields: Any) -> dict[str, Any]:
    words = " ".join(f"w{i}" for i in range(80))
    body: dict[str, Any] = {"model": model, "temperature": 0, "ignore_eos": True, "kv_budget": 16} | fields
    if route == "responses":
        return body | {"input": words, "max_output_tokens": 4}
    return (
        body
        | {"max_tokens": 4}
        | ({"prompt": words} if route == "completions" else {"messages": [{"role": "user", "content": words}]})
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_reject_is_a_503_before_the_headers(http: httpx.Client, model: str, route: str, stream: bool) -> None:
    body = body_of(route, model, kv_on_full="reject", stream=stream)
    with full_pool(http, model):
        response = http.post(f"/v1/{route}", json=body)
    assert "kv_on_full: reject" in refused(response, 503)
    assert response.headers["Retry-After"] == "1"
    again = http.post(f"/v1/{route}", json=body)
    assert again.status_code == 200, again.text
    assert '"mode":"calidrop"' in again.text.replace(" ", "")


def test_wait_queues_until_there_is_room(http: httpx.Client, model: str) -> None:
    waits = fresh_stats(http)["engines"][0]["totals"]["swap_waits"]
    with ThreadPoolExecutor(1) as pool:
        with full_pool(http, model):
            body = body_of("completions", model, kv_on_full="wait", stream=True)
            answer = pool.submit(http.post, "/v1/completions", json=body)
            engine = wait_until(http, lambda engine: engine["totals"]["swap_waits"] > waits)
            assert engine["waiting"] == 1
            assert engine["swap"]["used_blocks"] == 8
            assert not answer.done()
        response = answer.result()
    assert response.status_code == 200
    last = json.loads(response.text.strip().splitlines()[-3].removeprefix("data: "))
    assert last["calidrop"][0]["mode"] == "calidrop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("on_full", ["wait", "reject"])
def test_a_prompt_that_could_never_fit(http: httpx.Client, model: str, on_full: str, stream: bool) -> None:
    body = {"model": model, "prompt": LONG * 3 + LONG[:200], "max_tokens": 2, "kv_budget": 16, "kv_on_full": on_full}
    message = refused(http.post("/v1/completions", json=body | {"stream": stream}), 400, "kv_on_full")
    assert "1100 prompt tokens" in message
    assert complete(http, model, prompt=body["prompt"], kv_budget=16)["calidrop"][0]["reason"] == "swap_full"


# Bodies


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("route", ["/v1/completions", "/calidrop/defaults"])
def test_a_body_that_is_too_large(http: httpx.Client, route: str, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * 100_000 + b'"}'
    content = iter([body[:50_000], body[50_000:]]) if chunked else body
    headers = ADMIN if "calidrop" in route else KEY
    response = http.post(route, content=content, headers=headers | {"content-type": "application/json"})
    assert "100000 bytes" in refused(response, 413)


# Metrics


def scraped(http: httpx.Client) -> dict[str, float]:
    """Samples of ours by name and labels, read after this call."""
    fresh_stats(http)
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "vllm:prompt_tokens_total" in response.text
    families = text_string_to_metric_families(response.text)
    return {
        f"{sample.name}{sorted((k, v) for k, v in sample.labels.items() if k != 'model_name')}": sample.value
        for family in families
        if family.name.startswith("calidrop:")
        for sample in family.samples
    }


def test_metrics_are_the_sums_of_the_reports(http: httpx.Client, model: str) -> None:
    before = scraped(http)
    reports = [complete(http, model, kv_budget=budget)["calidrop"][0] for budget in (BUDGET, 64, 400)]
    for _ in range(2):
        refused(http.post("/v1/completions", json={"model": model} | COMPLETION | {"kv_budget": -1}), 400, "kv_budget")
    after = scraped(http)
    gained = {sample: value - before[sample] for sample, value in after.items()}
    engine = ("engine", "0")
    for name in ("kept", "evicted"):
        expected = sum(report[name] for report in reports if report["mode"] != "full")
        assert gained[f"calidrop:{name}_tokens_total{[engine]}"] == expected
    assert gained[f"calidrop:bytes_in_total{[engine]}"] == sum(report["bytes_read"] for report in reports)
    for layer in range(4):
        for name in ("recomputes", "merges", "plain", "group_reads", "pages_read"):
            expected = sum(report["layers"][name][layer] for report in reports if "layers" in report)
            assert gained[f"calidrop:{name}_total{[engine, ('layer', str(layer))]}"] == expected
    assert gained[f"calidrop:requests_total{[engine, ('mode', 'calidrop')]}"] == 2
    assert gained[f"calidrop:requests_total{[engine, ('mode', 'full')]}"] == 1
    assert gained[f"calidrop:requests_refused_total{[('reason', 'invalid')]}"] == 2
    exposed = {name for metric in metrics.METRICS for name in metric.exposed}
    assert {sample.partition("[")[0] for sample in after} - {"calidrop:requests_refused_created"} == exposed
    decisions = sum(report[name] for report in reports for name in ("recomputes", "merges", "plain"))
    assert gained[f"calidrop:similarity_count{[engine]}"] == decisions
    assert gained[f"calidrop:similarity_bucket{[engine, ('le', '+Inf')]}"] == decisions
    assert gained[f"calidrop:compaction_seconds_count{[engine]}"] == 2
    assert gained[f"calidrop:compaction_seconds_sum{[engine]}"] > 0


# Anything at all


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/calidrop/defaults"])
def test_no_body_is_a_500(http: httpx.Client, model: str, route: str, mode: GenerationMode) -> None:
    """schemathesis makes bodies from the served document: valid ones and, by NEGATIVE, all sorts of invalid ones. Of
    vLLM's routes the fields of this package are varied, beside a request that is right."""
    document = http.get("/openapi.json").json()
    base: dict[str, Any] = {}
    if route.startswith("/v1/"):
        base = body_of(route.removeprefix("/v1/"), model)
        _vary_our_fields_only(document, route)
    document["paths"] = {route: document["paths"][route]}
    operation = schemathesis.openapi.from_dict(document)[route]["POST"]
    seen: set[int] = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        body = case.body
        content = body if isinstance(body, bytes) else json.dumps(base | body if isinstance(body, dict) else body)
        headers = (ADMIN if "calidrop" in route else KEY) | {"content-type": "application/json"}
        response = http.post(route, content=content, headers=headers)
        assert response.status_code in (200, 400), response.text
        seen.add(response.status_code)

    ask()
    assert 400 in seen or mode is GenerationMode.POSITIVE
    if route == "/calidrop/defaults":
        back = dict.fromkeys(RequestSettings.model_fields)
        assert http.post(route, json=back, headers=ADMIN).status_code == 200


def _vary_our_fields_only(document: dict[str, Any], route: str) -> None:
    body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    properties = document["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]["properties"]
    ours = {name: properties[name] for name in RequestSettings.model_fields}
    body["schema"] = {"type": "object", "properties": ours, "additionalProperties": False}


# The end


def test_sigterm_lets_running_requests_finish(url: str, model: str) -> None:
    """The last test: the server is gone afterwards."""
    body = {"model": model} | COMPLETION | {"max_tokens": 48, "kv_budget": 40, "stream": True}
    started = []

    def stream(_: int) -> list[str]:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=120) as response:
            assert response.status_code == 200
            lines = []
            for line in response.iter_lines():
                started.append(1)
                lines.append(line)
        return [line for line in lines if line]

    with ThreadPoolExecutor(4) as pool:
        streams = pool.map(stream, range(4))
        for _ in range(2400):
            if len(started) >= 20:
                break
            time.sleep(0.05)
        (root,) = [p for p in psutil.process_iter(["cmdline"]) if _serves(p, url)]
        root.send_signal(signal.SIGTERM)
        for lines in streams:
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2].removeprefix("data: "))
            assert last["choices"][0]["finish_reason"] == "length"
            assert last["calidrop"][0]["prompt_tokens"] == 300


def _serves(process: psutil.Process, url: str) -> bool:
    command = process.info["cmdline"] or []
    return any("calidrop-server" in word for word in command) and url.rpartition(":")[2] in command
