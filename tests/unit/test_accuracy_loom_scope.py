"""LOOM-Scope's stand-in for vLLM: what its vLLM engine calls, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.accuracy.stub import Stub

PATH = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "loom_scope" / "vllm.py"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loom_stand_in", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return module


def test_asks_the_server_as_the_engine_would_be_asked(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stub(lambda body: body["prompt"].upper(), report=lambda body: {"kept": 64}) as stub:
        monkeypatch.setenv("CALIDROP_BASE_URL", stub.url)
        monkeypatch.setenv("CALIDROP_SETTINGS", json.dumps({"kv_budget": 64}))
        model = stand_in.LLM(model="any", tensor_parallel_size=1, gpu_memory_utilization=0.9, enforce_eager=True)
        outputs = model.generate("hello", stand_in.SamplingParams(max_tokens=5, temperature=0.0, top_p=None))
    assert outputs[0].outputs[0].text == "HELLO" and outputs[0].report == [{"kept": 64}]
    assert stub.bodies == [{"model": "stub", "prompt": "hello", "max_tokens": 5, "temperature": 0.0, "kv_budget": 64}]


def test_retries_and_refusals(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stub(lambda body: "x", fail=lambda body, earlier: 503 if earlier < 2 else None) as stub:
        monkeypatch.setenv("CALIDROP_BASE_URL", stub.url)
        model = stand_in.LLM(model="any")
        assert model.generate(["a"], stand_in.SamplingParams())[0].outputs[0].text == "x"
        assert len(stub.bodies) == 3
    with Stub(lambda body: "x", fail=lambda body, earlier: 400) as stub:
        model.base_url = stub.url
        with pytest.raises(RuntimeError, match="400"):
            model.generate("a", stand_in.SamplingParams())
