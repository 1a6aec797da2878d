"""The accuracy harness and lm-evaluation-harness against the served bundled model, small.

Scores are not the point: that every prompt is asked as it was made, every answer scored, every setting applied, is.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.accuracy import run, summary
from benchmarks.accuracy.__main__ import write_report
from benchmarks.accuracy.cells import cells_of
from benchmarks.accuracy.config import Config
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.store import read
from benchmarks.accuracy.tasks import ruler
from benchmarks.accuracy.tokens import Tokens
from tests.engine.cases import MODEL

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
# lm-eval brings many packages: the Python of an environment that has it, this one by default.
LM_EVAL_PYTHON = os.environ.get("LM_EVAL_PYTHON") or (sys.executable if find_spec("lm_eval") else None)


def measure(server: str, folder: Path, **fields: Any) -> tuple[Config, list[run.Sample], list[dict[str, Any]]]:
    raw = {"name": "endpoint", "server": {"model": MODEL}, "client": {"concurrency": 8}, "bootstrap": 200} | fields
    config = Config.model_validate(raw)
    samples = run.samples_for(config, MODEL, None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"model": MODEL, "mode": config.client.mode}))
    assert asyncio.run(run.execute(config, samples, f"{server}/v1", folder, None)) == []
    write_report(config, samples, folder)
    records = read(folder / "results.jsonl")
    assert len(records) == len(samples) * len(cells_of(config.sweep))
    return config, samples, records


def assert_records_are_right(
    samples: list[run.Sample], records: list[dict[str, Any]], chat_tokens: bool = False
) -> None:
    """The server counted the prompt we counted, the score is the metric of the stored text, the report fits."""
    tokens = Tokens(MODEL)
    by_id = {sample.id: sample for sample in samples}
    for record in records:
        sample = by_id[f"{record['task']}/{record['length']}/{record['index']}"]
        assert record["prompt_tokens"] == tokens.count(sample.prompt + sample.prefix)
        assert record["prompt_tokens"] + sample.max_tokens <= max(sample.length, 1152)
        assert record["score"] == score(record["text"], sample)
        assert record["answers"] == sample.answers
        entry = record["report"]
        assert entry["prompt_tokens"] == record["prompt_tokens"] == entry["kept"] + entry["evicted"]
        if record["cell"] == "full":
            assert entry["evicted"] == 0 and entry["mode"] == "full"
        else:
            assert entry["kept"] == 64
            decisions = entry["recomputes"] + entry["merges"] + entry["plain"]
            steps = record["completion_tokens"] - 1
            assert decisions == (0 if "kv_calibration=False" in record["cell"] else 16 * steps)


SNAPKV = {"policies": ["snapkv"], "budgets": [64]}


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_small_tasks(server: str, tmp_path: Path, mode: str) -> None:
    """Both modes ask the same tokens, so full KV answers the same; it is nearly always right."""
    tasks = [{"suite": "small", "lengths": [256], "count": 2}]
    _, samples, records = measure(server, tmp_path, tasks=tasks, sweep=SNAPKV, client={"mode": mode})
    assert_records_are_right(samples, records)
    full = [record["score"] for record in records if record["cell"] == "full"]
    assert len(full) == 12 and sum(full) >= 9


def test_rates_are_those_of_the_reports(server: str, tmp_path: Path) -> None:
    """theta1 = 2 reads everything at every step, theta1 = -2 nothing."""
    tasks = [{"suite": "small", "names": ["multi_query"], "lengths": [256], "count": 3}]
    sweep = SNAPKV | {"thresholds": [(2, 2), (-2, -2)], "full": True}
    config, samples, records = measure(server, tmp_path, tasks=tasks, sweep=sweep)
    rows = summary.summarize(config, samples, tmp_path)["cells"]
    always, never = (row["lengths"]["256"]["all"] for row in rows[-2:])
    assert (always["recompute_rate"], always["group_rate"], always["read_fraction"]) == (1, 1, 1)
    assert (never["recompute_rate"], never["merge_rate"], never["bytes_read"]) == (0, 1, 0)
    # 4 layers x 2 KV heads x 192 evicted tokens x 64 x (K, V) x 2 bytes, once per step
    steps = sum(r["completion_tokens"] - 1 for r in records if "kv_theta1=2.0" in r["cell"]) / 3
    assert always["bytes_read"] == pytest.approx(steps * 4 * 2 * 192 * 64 * 2 * 2)
    assert (tmp_path / "accuracy_by_bytes_256.png").exists() and "+CaliDrop" in (tmp_path / "report.md").read_text()


def test_ruler_end_to_end(server: str, tmp_path: Path) -> None:
    tasks = [{"suite": "ruler", "lengths": [1024], "count": 1}]
    _, samples, records = measure(server, tmp_path, tasks=tasks, sweep=SNAPKV)
    assert {record["task"] for record in records} == set(ruler.GENERATORS) and len(records) == 39
    assert_records_are_right(samples, records)


def test_needle_in_a_haystack_end_to_end(server: str, tmp_path: Path) -> None:
    options = {"depths": [0.0, 0.5, 1.0]}
    tasks = [{"suite": "niah", "lengths": [256, 512], "count": 1, "options": options}]
    _, samples, records = measure(server, tmp_path, tasks=tasks, sweep=SNAPKV)
    assert_records_are_right(samples, records)
    assert (tmp_path / "needle_full.png").exists() and (tmp_path / "needle_64.png").exists()


def test_a_setting_the_server_refuses_is_reported(server: str, tmp_path: Path) -> None:
    tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 1}]
    sweep = {"policies": ["snapkv"], "full": False, "evicted_only": False, "extra": {"kv_pool_kernel": 4}}
    config = Config.model_validate({"name": "endpoint", "tasks": tasks, "sweep": sweep})
    failures = asyncio.run(run.execute(config, run.samples_for(config, MODEL, None), f"{server}/v1", tmp_path, None))
    assert len(failures) == 1 and "kv_pool_kernel" in failures[0]


# lm-evaluation-harness


class Witness:
    """Passes requests on to the server and remembers them with their answers: lm-eval itself shows no reports."""

    def __init__(self, server: str) -> None:
        self.exchanges: list[tuple[dict[str, Any], dict[str, Any]]] = []
        witness = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {"Content-Type": "application/json"}
                answer = httpx.post(server + self.path, content=content, headers=headers, timeout=120)
                witness.exchanges.append((json.loads(content), answer.json()))
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def witness(server: str) -> Iterator[Witness]:
    found = Witness(server)
    yield found
    found.server.shutdown()


@pytest.mark.skipif(LM_EVAL_PYTHON is None, reason="lm-eval is not installed: set LM_EVAL_PYTHON")
def test_lm_evaluation_harness(server: str, witness: Witness, tmp_path: Path) -> None:
    """--gen_kwargs kv_budget=64 reaches the engine with every request, and lm-eval's score is that of the answers."""
    assert LM_EVAL_PYTHON is not None
    model = httpx.get(f"{server}/v1/models").json()["data"][0]["id"]
    arguments = f"model={model},base_url={witness.url}/v1/completions,num_concurrent=4,tokenizer_backend=none"
    command = [LM_EVAL_PYTHON, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--include_path", "benchmarks/accuracy/lm_eval", "--tasks", "small_retrieval", "--limit", "6"]
    command += ["--gen_kwargs", "kv_budget=64,kv_theta1=0.8", "--output_path", str(tmp_path), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(witness.exchanges) == 6
    for body, answer in witness.exchanges:
        assert (body["kv_budget"], body["kv_theta1"]) == (64, 0.8)
        assert answer["calidrop"][0]["kept"] == 64 and answer["calidrop"][0]["evicted"] == 512 - 64
    results = json.loads(next(tmp_path.glob("**/results_*.json")).read_text())
    said = {body["prompt"] if isinstance(body["prompt"], str) else body["prompt"][0] for body, _ in witness.exchanges}
    assert all(len(prompt.split()) == 512 for prompt in said) and len(said) == 6
    rows = [json.loads(line) for line in next(tmp_path.glob("**/samples_*.jsonl")).read_text().splitlines()]
    right = [row["resps"][0][0].split() == row["target"].split() for row in rows]
    assert results["results"]["small_retrieval"]["exact,none"] == pytest.approx(sum(right) / 6)
