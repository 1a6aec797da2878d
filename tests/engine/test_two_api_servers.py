"""Two API processes before one engine: defaults reach both, and totals count once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import CALIDROP_SERVER, serving

pytestmark = pytest.mark.engine

ADMIN = {"Authorization": "Bearer operator"}
BODY: dict[str, Any] = {"prompt": list(range(10, 310)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
CONNECTIONS = 8  # each request its own, spread over both processes


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    log = tmp_path_factory.mktemp("two-api-servers") / "log"
    options = ("--enforce-eager", "--api-server-count", "2")
    with serving(log, *options, program=CALIDROP_SERVER, CALIDROP_ADMIN_KEY="operator") as url:
        for _ in range(600):  # the first that serves is not the last
            if len(answering_processes(log)) == 2:
                break
            time.sleep(0.5)
        yield url, log


def ask_both(url: str, ask: Callable[[httpx.Client], Any]) -> list[Any]:
    """The same question over several connections: the processes take turns by their number of connections."""
    clients = [httpx.Client(base_url=url, timeout=120) for _ in range(CONNECTIONS)]
    try:
        for client in clients:
            client.get("/health")  # all connections are open at once, so both processes have some
        return [ask(client) for client in clients]
    finally:
        for client in clients:
            client.close()


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    (report,) = response.json()["calidrop"]
    return report


def answering_processes(log: Path) -> set[str]:
    """Who said that it serves."""
    lines = [line for line in log.read_text().splitlines() if "Started server process" in line]
    return {line.rpartition("[")[2] for line in lines}


def test_defaults_reach_both(both: tuple[str, Path]) -> None:
    url, log = both
    assert len(answering_processes(log)) == 2
    with httpx.Client(base_url=url, timeout=120) as one:
        changed = one.post("/calidrop/defaults", json={"kv_budget": 50}, headers=ADMIN)
        assert changed.status_code == 200, changed.text
        version = changed.json()["defaults_version"]
        assert complete(one)["kept"] == 50, "the process that answered uses them at once"
        wait = one.get("/calidrop/config").json()["refresh_seconds"]
    for _ in range(30):
        time.sleep(wait)
        versions = ask_both(url, lambda client: client.get("/calidrop/config").json()["defaults_version"])
        if set(versions) == {version}:
            break
    assert set(versions) == {version}
    assert {report["kept"] for report in ask_both(url, complete)} == {50}


def scraped(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families if family.name.startswith("calidrop:") for sample in family.samples]
    by_name = {f"{s.name}{sorted(s.labels.items())}": s.value for s in samples}
    assert len(by_name) == len(samples), "each series once"
    return {name: value for name, value in by_name.items() if "_total[" in name}


def settled(url: str) -> dict[str, float]:
    """The totals when every process shows the same ones."""
    for _ in range(60):
        time.sleep(1)
        first, *others = ask_both(url, scraped)
        if all(other == first for other in others):
            return first
    raise AssertionError((first, others))


def value_of(samples: dict[str, float], name: str) -> float:
    return sum(value for sample, value in samples.items() if sample.startswith(f"calidrop:{name}_total["))


def test_totals_are_counted_once(both: tuple[str, Path]) -> None:
    url, _ = both
    before = settled(url)
    reports = ask_both(url, lambda client: complete(client, kv_budget=40))
    refusals = ask_both(url, lambda client: client.post("/v1/completions", json=BODY | {"kv_budget": 0}).status_code)
    assert refusals == [400] * CONNECTIONS
    for _ in range(60):
        after = settled(url)
        if value_of(after, "bytes_in") - value_of(before, "bytes_in") == sum(r["bytes_read"] for r in reports):
            break
    for name, report_name in (("kept_tokens", "kept"), ("evicted_tokens", "evicted"), ("bytes_in", "bytes_read"),
                              ("recomputes", "recomputes"), ("merges", "merges"), ("plain", "plain")):  # fmt: skip
        gained = value_of(after, name) - value_of(before, name)
        assert gained == sum(report[report_name] for report in reports), name
    assert value_of(after, "requests") - value_of(before, "requests") == CONNECTIONS
    assert value_of(after, "requests_refused") - value_of(before, "requests_refused") == CONNECTIONS
