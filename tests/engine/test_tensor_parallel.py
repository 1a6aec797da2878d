"""Two tensor-parallel ranks on CPU: the same answers as the reference, counters summed over ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.cases import POLICIES, CachedReference, prompt_of
from tests.engine.conftest import serving
from tests.engine.harness import Answer, Ask, difference, too_close

pytestmark = pytest.mark.engine
RECALL: tuple[dict[str, Any], ...] = ({}, {"kv_recall": "pages"}, {"kv_recall": "pages", "kv_recall_buffer": 3})


def test_two_ranks_equal_the_reference(tmp_path: Path, reference: CachedReference) -> None:
    options = ("--tensor-parallel-size", "2", "--enforce-eager", "--dtype", "float32")
    with serving(tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="0|1") as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        for seed, (policy, recall) in enumerate(itertools.product(POLICIES, RECALL)):
            ask = Ask(prompt_of(400, seed), 20, {"kv_budget": 64, "kv_policy": policy, **recall})
            fields = {"model": model, "prompt": ask.prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            body = fields | ask.settings | {"return_token_ids": True}
            answered = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()
            tokens, report = answered["choices"][0]["token_ids"], answered["calidrop"][0]
            answer, expected = Answer(tokens, report, [], 0, []), reference(ask)
            assert difference(ask, answer, expected) is None or too_close(expected)
