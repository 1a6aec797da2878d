"""Forced tokens: offline and over HTTP, on both model runners, and a fidelity run on a natural language model."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.fidelity.asking import Endpoint, FidelityError, Question
from benchmarks.models import path_of
from tests.engine.cases import MODEL, ROOT, prompt_of
from tests.engine.harness import Engine
from vllm_calidrop.forcing import FIELD, NAME

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(MODEL, logits_processors=[NAME])
    yield engine
    engine.close()


def answers(engine: Engine, prompts: list[list[int]], extra: list[dict[str, Any]], steps: int = 8) -> list[Any]:
    """Completions with the log-probabilities of 20 tokens a step, all prompts in one batch."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=20, extra_args=each or None)
        for each in extra
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def test_an_answer_is_forced_and_its_distributions_are_the_models_own(engine: Engine) -> None:
    """Forcing the tokens that come anyway changes no log-probability; a neighbour without forcing is untouched."""
    prompt = prompt_of(200, 0)
    [free] = answers(engine, [prompt], [{}])
    other = [(token + 3) % 90 + 5 for token in free.token_ids]
    same, forced, beside = answers(
        engine, [prompt] * 3, [{FIELD: list(free.token_ids)}, {FIELD: other}, {}]
    )  # fmt: skip
    assert same.token_ids == free.token_ids == beside.token_ids
    assert forced.token_ids == other
    for mine, alone in zip(same.logprobs, free.logprobs, strict=True):
        assert mine.keys() == alone.keys()
        assert all(abs(mine[token].logprob - alone[token].logprob) < 1e-4 for token in mine)
    # The mask comes after the log-probabilities: the first step is the free answer's, though another token was drawn.
    first = forced.logprobs[0]
    assert all(abs(first[token].logprob - free.logprobs[0][token].logprob) < 1e-4 for token in free.logprobs[0])


def test_forcing_ends_with_its_list_and_goes_with_eviction(engine: Engine) -> None:
    prompt = prompt_of(330, 1)
    settings = {"kv_budget": 48, "kv_theta1": 2.0, "kv_theta2": 2.0}
    free, short = answers(engine, [prompt] * 2, [settings, settings | {FIELD: [7, 9]}])
    assert list(short.token_ids[:2]) == [7, 9] and len(short.token_ids) == 8
    [evicted] = answers(engine, [prompt], [settings | {FIELD: list(free.token_ids)}])
    assert evicted.token_ids == free.token_ids and evicted.calidrop["evicted"] == len(prompt) - 48


@pytest.mark.parametrize("bad", [[], "5", [1.5], [True], [-1], [10**6], [3, None]])
def test_bad_ids_are_refused_by_name(engine: Engine, bad: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=FIELD) as caught:
        answers(engine, [prompt_of(200, 0)], [{FIELD: bad}])
    assert caught.value.parameter == FIELD


def test_the_v2_runner_forces_too() -> None:
    """In a process of its own, under Triton's interpreter (tests/support/v2_runner)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "v2_runner"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    code = """
import tests.engine.conftest
from tests.engine.cases import MODEL
from tests.engine.harness import Engine
from tests.engine import test_forcing as tests
from vllm_calidrop.forcing import NAME

engine = Engine(MODEL, logits_processors=[NAME], max_num_batched_tokens=100, num_gpu_blocks_override=256)
assert type(engine.worker.model_runner).__module__ == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
tests.test_an_answer_is_forced_and_its_distributions_are_the_models_own(engine)
tests.test_forcing_ends_with_its_list_and_goes_with_eviction(engine)
print("forced on V2")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "forced on V2" in run.stdout


@pytest.fixture(scope="module", params=["forcing", "plain"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server with the logits processor, and one without it: (which, base URL)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", MODEL, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--attention-backend", "calidrop", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    if request.param == "forcing":
        command += ["--logits-processors", NAME]
    log = tmp_path_factory.mktemp("forcing") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.25)
            yield request.param, f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_over_http(served: tuple[str, str]) -> None:
    which, base_url = served
    if which == "plain":
        with pytest.raises(FidelityError, match=re.escape(f"--logits-processors {NAME}")):
            Endpoint(base_url)
        return
    prompt = prompt_of(200, 0)
    endpoint = Endpoint(base_url)
    [free] = endpoint.ask([Question(prompt, {}, 6)])
    settings = {"kv_budget": 48, "kv_theta1": 2.0, "kv_theta2": 2.0}
    [forced] = endpoint.ask([Question(prompt, settings, 6, free.tokens)])
    assert forced.tokens == free.tokens and forced.report is not None
    assert forced.report["evicted"] == len(prompt) - 48
    for mine, full in zip(forced.logprobs, free.logprobs, strict=True):
        assert all(abs(mine[token] - full[token]) < 1e-3 for token in mine.keys() & full.keys())
    for bad in ([-1], [10**6], []):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "vllm_xargs": {FIELD: bad}}
        response = httpx.post(f"{base_url}/completions", json=body, timeout=60)
        assert response.status_code == 400 and response.json()["error"]["param"] == FIELD, response.text


def test_a_fidelity_run_on_a_natural_model(tmp_path: Path) -> None:
    """Two short prompts of SmolLM2, three rows: full KV's own distributions where everything is read, others elsewhere;
    and the same command again asks nothing."""
    path_of("smollm2-135m", fetch=False)
    rows = tmp_path / "rows.toml"
    rows.write_text(
        'budget = 64\n[[row]]\nlabel = "all"\nsettings = { kv_theta1 = 2.0, kv_theta2 = 2.0 }\n'
        '[[row]]\nlabel = "kept"\nsettings = { kv_calibration = false }\n'
        '[[row]]\nlabel = "pages"\nsettings = { kv_recall = "pages" }\n'
    )
    command = [
        sys.executable,
        "-m",
        "benchmarks.fidelity",
        "--model",
        "smollm2-135m",
        "--length",
        "400",
        "--limit",
        "2",
    ]
    command += ["--steps", "6", "--rows", str(rows), "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr[-4000:]
    import json

    summary = json.loads((tmp_path / "summary.json").read_text())
    of = {row["label"]: row for row in summary["rows"]}
    assert len(summary["prompts"]) == 2 and summary["run"]["title"] == "SmolLM2-135M-Instruct"
    assert of["all"]["kl"] < 1e-6 and of["all"]["read_share"] == pytest.approx(1)
    assert of["kept"]["kl"] > 1e-4 and of["kept"]["read_share"] == 0
    assert 0 < of["pages"]["read_share"] < 1 and 0.06 < of["pages"]["device_share"] < 0.08
    assert of["kept"]["kl_interval"] is None, "two prompts are too few for an interval"
    answered = (tmp_path / "results.jsonl").read_bytes()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "prompts," not in again.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == answered
