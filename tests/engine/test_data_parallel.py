"""Two data-parallel ranks behind two API processes on CPU: the reference's answers from each, and true totals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.cases import POLICIES, CachedReference, prompt_of
from tests.engine.conftest import CALIDROP_SERVER, serving
from tests.engine.harness import Answer, Ask, difference, too_close

pytestmark = pytest.mark.engine


def test_two_ranks_equal_the_reference(tmp_path: Path, reference: CachedReference) -> None:
    options = ("--data-parallel-size", "2", "--api-server-count", "2", "--enforce-eager", "--dtype", "float32")
    asks = [
        Ask(prompt_of(300, seed), 12, {"kv_budget": 64, "kv_policy": policy}) for seed, policy in enumerate(POLICIES)
    ]
    with serving(tmp_path / "log", *options, program=CALIDROP_SERVER, VLLM_CPU_OMP_THREADS_BIND="0|1") as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        for rank in (0, 1):
            for ask in asks:
                body = {"model": model, "prompt": ask.prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
                answered = httpx.post(
                    f"{url}/v1/completions",
                    json=body | ask.settings | {"return_token_ids": True},
                    headers={"X-data-parallel-rank": str(rank)},
                    timeout=300,
                )
                choice = answered.raise_for_status().json()
                tokens, report = choice["choices"][0]["token_ids"], choice["calidrop"][0]
                answer, expected = Answer(tokens, report, [], 0, []), reference(ask)
                assert difference(ask, answer, expected) is None or too_close(expected)
        # Whichever process answers, each rank has counted its own three requests, once.
        for _ in range(6):
            engines = idle_engines(url)
            assert [engine["engine"] for engine in engines] == [0, 1]
            for engine in engines:
                assert engine["totals"]["requests_by_mode"] == {"calidrop": len(asks), "evict": 0, "full": 0}
                assert engine["totals"]["evicted_tokens"] == sum(len(ask.prompt) - 64 for ask in asks)
        # A scrape shows the same from the start of its process's next reading on.
        for _ in range(6):
            assert scraped(url, "calidrop:evicted_tokens_total", len(asks) * (300 - 64)) == {
                engine: len(asks) * (300 - 64) for engine in ("0", "1")
            }


def idle_engines(url: str) -> list[dict[str, Any]]:
    """The engines by rank, once nothing runs and nothing is held."""
    for _ in range(100):
        engines: list[dict[str, Any]] = httpx.get(f"{url}/calidrop/stats", timeout=60).json()["engines"]
        if not any(engine["sequences"] or engine["swap"]["used_blocks"] for engine in engines):
            return sorted(engines, key=lambda engine: engine["engine"])
        time.sleep(0.2)
    raise AssertionError(f"still in use: {engines}")


def scraped(url: str, name: str, awaited: float) -> dict[str, float]:
    """A metric by its label `engine`, once every engine has the value that is awaited, or after five seconds."""
    for _ in range(50):
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        values = {sample.labels["engine"]: sample.value for sample in samples}
        assert len(values) == len(samples)
        if set(values.values()) == {awaited}:
            break
        time.sleep(0.1)
    return values
