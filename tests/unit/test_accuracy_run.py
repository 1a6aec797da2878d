"""The driver: nothing asked twice, nothing lost, whatever the server or the user does in between."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import client, report, run, summary
from benchmarks.accuracy.cells import Cell, cells_of
from benchmarks.accuracy.client import Endpoint
from benchmarks.accuracy.config import Client, Config, Sweep, load
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.store import Store, read
from benchmarks.accuracy.stub import Body, Stub
from benchmarks.accuracy.tasks import small
from benchmarks.intervals import interval
from benchmarks.small_model import language

CONFIGS = Path(run.__file__).parent / "configs"
COUNTS = {"recomputes": [4, 0], "merges": [2, 8], "plain": [10, 8], "group_reads": [2, 0]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))


def config_of(**fields: Any) -> Config:
    tasks = [{"suite": "small", "names": ["single", "follow_up"], "lengths": [96], "count": 5}]
    return Config.model_validate({"name": "test", "kv_heads": 2, "tasks": tasks} | fields)


def right_answer(samples: list[Sample]) -> Any:
    answers = {sample.prompt: sample.answers[0] for sample in samples}
    return lambda body: answers[body["prompt"]]


def report_of(body: Body) -> dict[str, Any]:
    """Four steps of a model with two layers, four query heads, two KV heads."""
    sums = {name: sum(counts) for name, counts in COUNTS.items()}
    if "kv_budget" not in body:
        empty = {"kept": 96, "evicted": 0, "mode": "full", "reason": "no_budget", "bytes_read": 0}
        return empty | dict.fromkeys(sums, 0)
    if not body.get("kv_calibration", True):
        empty = {"kept": 64, "evicted": 32, "mode": "evict", "reason": "calibration_off", "bytes_read": 0}
        return empty | dict.fromkeys(sums, 0) | {"layers": {name: [0, 0] for name in COUNTS}}
    counted = {"kept": 64, "evicted": 32, "mode": "calidrop", "reason": None, "bytes_read": 1000, "pages_read": 2}
    return counted | sums | {"layers": COUNTS}


def execute(config: Config, samples: list[Sample], stub: Stub, folder: Path) -> list[str]:
    return asyncio.run(run.execute(config, samples, stub.url, folder, None))


def test_every_sample_in_every_cell_once(tmp_path: Path) -> None:
    config = config_of()
    samples = run.samples_for(config, None, None)
    with Stub(right_answer(samples), report=report_of) as stub:
        assert execute(config, samples, stub, tmp_path) == []
    cells = cells_of(config.sweep)
    assert len(stub.bodies) == len(samples) * len(cells) == 70
    records = read(tmp_path / "results.jsonl")
    assert len({(r["cell"], r["task"], r["length"], r["index"]) for r in records}) == 70
    assert all(record["score"] == 1 for record in records)
    for cell in cells:
        assert sum(all(body.get(k) == v for k, v in cell.fields.items()) for body in stub.bodies) >= len(samples)


def test_resume_asks_only_what_is_missing(tmp_path: Path) -> None:
    """Killed in the middle of a line: that sample is asked again, and no other one."""
    config = config_of()
    samples = run.samples_for(config, None, None)
    with Stub(right_answer(samples)) as stub:
        execute(config, samples, stub, tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:40]) + lines[40][:30])
    with Stub(right_answer(samples)) as stub:
        execute(config, samples, stub, tmp_path)
    assert len(stub.bodies) == 30
    records = read(path)
    assert len({record["key"] for record in records}) == len(records) == 70


def test_interrupt_loses_nothing(tmp_path: Path) -> None:
    config = config_of()
    samples = run.samples_for(config, None, None)
    asked = 0

    def answer(body: Body) -> str:
        nonlocal asked
        asked += 1
        return right_answer(samples)(body)

    async def interrupted(url: str) -> None:
        task = asyncio.create_task(run.execute(config, samples, url, tmp_path, None))
        while asked < 20:
            await asyncio.wait([task], timeout=0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Stub(answer) as stub:
        asyncio.run(interrupted(stub.url))
    stored = len(read(tmp_path / "results.jsonl"))
    assert 0 < stored < 70
    with Stub(right_answer(samples)) as stub:
        execute(config, samples, stub, tmp_path)
    assert len(stub.bodies) == 70 - stored
    assert len(read(tmp_path / "results.jsonl")) == 70


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_failures_are_tried_again(tmp_path: Path, status: int) -> None:
    config = config_of()
    samples = run.samples_for(config, None, 1)
    with Stub(right_answer(samples), fail=lambda body, earlier: status if earlier < 2 else None) as stub:
        assert execute(config, samples, stub, tmp_path) == []
    records = read(tmp_path / "results.jsonl")
    assert len(records) == 14 and len(stub.bodies) == 42
    assert all(record["attempts"] == 3 for record in records)


def test_back_off_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.asyncio, "sleep", note)
    config = config_of(client={"retries": 8})

    async def ask(url: str) -> None:
        with pytest.raises(client.openai.InternalServerError):
            await client.Endpoint(url, config.client).ask({"model": "m", "prompt": "p"})

    with Stub(lambda body: "", fail=lambda body, earlier: 500) as stub:
        asyncio.run(ask(stub.url))
    assert waited == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_refusal_is_reported_and_asked_again_next_time(tmp_path: Path) -> None:
    config = config_of(client={"retries": 1})
    samples = run.samples_for(config, None, 1)
    refuse = [400]
    with Stub(right_answer(samples), fail=lambda body, earlier: refuse[0] if "kv_budget" not in body else None) as stub:
        failures = execute(config, samples, stub, tmp_path)
        assert len(failures) == 2 and all("as told" in line for line in failures)
        assert len(stub.bodies) == 14  # a 400 is not tried again
        refuse[0] = None  # type: ignore[call-overload]
        assert execute(config, samples, stub, tmp_path) == []
    assert len(read(tmp_path / "results.jsonl")) == 14


def test_concurrency_is_a_limit(tmp_path: Path) -> None:
    config = config_of(client={"concurrency": 3})
    samples = run.samples_for(config, None, None)
    answer = right_answer(samples)

    def slow(body: Body) -> str:
        time.sleep(0.01)
        return answer(body)

    with Stub(slow) as stub:
        execute(config, samples, stub, tmp_path)
    assert stub.most_in_flight == 3


def test_deadline_keeps_prompts_whole(tmp_path: Path) -> None:
    """What is left out at the deadline is left out of the figures of every cell."""
    config = config_of(max_minutes=0.004, client={"concurrency": 2})
    samples = run.samples_for(config, None, None)
    answer = right_answer(samples)

    def slow(body: Body) -> str:
        time.sleep(0.02)
        return answer(body)

    with Stub(slow, report=report_of) as stub:
        execute(config, samples, stub, tmp_path)
    assert 0 < len(stub.bodies) < 70
    found = summary.complete(read(tmp_path / "results.jsonl"), samples, cells_of(config.sweep))
    assert len({tuple((r["task"], r["index"]) for r in records) for records in found.values()}) == 1


def test_chat_mode_is_a_conversation(tmp_path: Path) -> None:
    config = config_of(client={"mode": "chat"}, sweep={"policies": []})
    samples = run.samples_for(config, None, 1)
    with Stub(lambda body: "x") as stub:
        execute(config, samples, stub, tmp_path)
    roles = sorted([message["role"] for message in body["messages"]] for body in stub.bodies)
    assert roles == [["user"], ["user", "assistant", "user"]]
    for body, sample in zip(sorted(stub.bodies, key=lambda b: len(b["messages"])), samples):
        assert " ".join(message["content"] for message in body["messages"]) == sample.prompt


@pytest.mark.parametrize("place", ["user", "assistant"])
def test_answer_prefix_in_chat(place: str) -> None:
    sample = Sample("t", 0, 0, "question", ["a"], "exact", 5, prefix=" Answer:")
    settings = config_of(client={"mode": "chat", "answer_prefix": place}).client
    body = client.request_body(sample, {"kv_budget": 8}, "m", settings)
    if place == "user":
        assert body["messages"] == [{"role": "user", "content": "question Answer:"}]
        assert body["extra_body"] == {"kv_budget": 8}
    else:
        assert body["messages"][1] == {"role": "assistant", "content": "Answer:"}
        assert body["extra_body"]["continue_final_message"] is True


def test_small_tasks_are_the_models_own() -> None:
    samples = run.samples_for(config_of(), None, None)
    assert len(samples) == 10
    for sample in samples:
        item = language.make(sample.task, 96, sample.index)
        assert sample.prompt == item.prompt and len(sample.prompt.split()) == 96
        assert sample.answers == [item.answer.removesuffix(" <end>")]
        assert sample.max_tokens == len(item.answer.split()) + small.SLACK


def test_cells_of_a_sweep() -> None:
    sweep = Sweep(budgets=[32, 64], thresholds=[(0.6, 0.8), (0.7, 0.85)], reuse_off=[0.7])
    cells = cells_of(sweep)
    assert len(cells) == 1 + 2 * 3 * (1 + 2 + 1)
    assert cells[0].fields == {} and cells[0].label == "FullKV"
    assert cells[1] == Cell("streaming_llm", 32) and cells[1].fields["kv_calibration"] is False
    assert cells[4].fields["kv_theta2"] == 2 and cells[4].label == "+CaliDrop .70/–"
    with pytest.raises(AssertionError, match="twice"):
        cells_of(Sweep(thresholds=[(0.7, 0.85), (0.7, 0.85)]))


def test_unknown_names_in_a_configuration_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\nbudget = 3\n[[tasks]]\nsuite = "small"\n')
    with pytest.raises(ValueError, match="budget"):
        load(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_configurations_are_valid(path: Path) -> None:
    assert cells_of(load(path).sweep)


def test_summary_counts(tmp_path: Path) -> None:
    """Scores and rates of a run whose answers and reports are known."""
    config = config_of(sweep={"policies": ["snapkv"]})
    samples = run.samples_for(config, None, None)
    answer = right_answer(samples)
    wrong = {sample.prompt for sample in samples if sample.task == "single" and sample.index < 2}

    def some_wrong(body: Body) -> str:
        return "no" if body["prompt"] in wrong and body.get("kv_calibration") is False else answer(body)

    with Stub(some_wrong, report=report_of) as stub:
        execute(config, samples, stub, tmp_path)
    figures = summary.summarize(config, samples, tmp_path)
    full, evicted, calibrated = (row["lengths"]["96"] for row in figures["cells"])
    assert full["all"]["score"] == calibrated["all"]["score"] == 1
    assert evicted["single"]["score"] == pytest.approx(0.6) and evicted["all"]["score"] == pytest.approx(0.8)
    assert evicted["all"]["low"] is None, "five prompts of a task are too few for an interval"
    assert evicted["all"]["against_full"] == pytest.approx({"mean": -0.2, "low": None, "high": None})
    assert "against_full" not in full["all"] and calibrated["all"]["against_full"]["mean"] == 0
    total = calibrated["all"]
    assert (total["n"], total["bytes_read"]) == (10, 1000)
    # 32 decisions: 4 recompute, 10 merge, 18 kept only; 4 steps x 2 layers x 2 KV heads = 16 possible reads, 2 done.
    assert total["recompute_rate"] == 4 / 32 and total["merge_rate"] == 10 / 32 and total["plain_rate"] == 18 / 32
    assert total["group_rate"] == total["read_fraction"] == 2 / 16
    assert total["recompute_by_layer"] == [4 / 16, 0]
    text = report.markdown(figures, {"model": "m", "mode": "completion"}, "policies", [])
    assert "| +CaliDrop .70/.85 | 100.00 | 100.00 | **100.00** |  |" in text
    assert "| SnapKV | 60.00 | 100.00 | 80.00 |" in text and "Note" not in text


def test_other_servers_are_said_not_to_compress(tmp_path: Path) -> None:
    config = config_of(sweep={"policies": ["snapkv"]})
    samples = run.samples_for(config, None, 2)
    with Stub(right_answer(samples)) as stub:
        execute(config, samples, stub, tmp_path)
    figures = summary.summarize(config, samples, tmp_path)
    text = report.markdown(figures, {"model": "m", "mode": "completion"}, "policies", [])
    assert text.count("4 answers came without a `calidrop` report") == 2


def test_answers_to_another_seed_are_not_counted(tmp_path: Path) -> None:
    samples = {}
    for seed in (0, 1):
        tasks = [{"suite": "small", "names": ["single"], "lengths": [96], "count": 3 - seed, "seed": 100 * seed}]
        config = config_of(tasks=tasks, sweep={"policies": []})
        samples[seed] = run.samples_for(config, None, None)
        with Stub(right_answer(samples[seed])) as stub:
            execute(config, samples[seed], stub, tmp_path)
    records = read(tmp_path / "results.jsonl")
    assert len(records) == 5
    for seed in (0, 1):
        found = summary.complete(records, samples[seed], cells_of(config.sweep))["full"]
        assert [record["meta"]["seed"] for record in found] == [s.meta["seed"] for s in samples[seed]]


def test_calibration_size_lowers_the_fraction_read() -> None:
    entry = {"completion_tokens": 5, "prompt_tokens": 96, "calibration_size": 8, "report": report_of({"kv_budget": 64})}
    figures = summary.cost([entry], summary.ModelShape(kv_heads=2))
    assert figures["read_fraction"] == figures["group_rate"] * 8 / 32


def test_rows_by_pages() -> None:
    """What they ask for, and the part of the evicted KV their pages are."""
    cells = cells_of(Sweep(policies=["snapkv"], recall=[{}, {"kv_recall_buffer": 4, "kv_recall_theta": 0.5}]))
    assert [cell.label for cell in cells[-2:]] == ["+pages", "+pages buffer 4 theta 0.5"]
    assert cells[-1].fields.items() >= {"kv_recall": "pages", "kv_recall_buffer": 4, "kv_budget": 64}.items()
    report = report_of({"kv_budget": 64}) | {"pages_read": 3}
    entry = {"completion_tokens": 5, "prompt_tokens": 96, "recall": True, "report": report}
    assert summary.cost([entry], summary.ModelShape(kv_heads=2))["read_fraction"] == 3 * 16 / 32 / 16


def test_rows_by_how_evicted_kv_is_stored() -> None:
    stored = [{"kv_codec": "int2"}, {"kv_codec": "int4", "kv_calibration_size": 8}, {"kv_read_budget": 9000}]
    cells = cells_of(Sweep(policies=["snapkv"], thresholds=[(0.8, 0.85)], stored=stored))
    labels = ["int2", "size 8 int4", "read budget 9000"]
    assert [cell.label for cell in cells[-3:]] == [f"+CaliDrop .80/.85 {label}" for label in labels]
    plain = cells[-4].fields
    assert [cell.fields for cell in cells[-3:]] == [plain | fields for fields in stored]
    assert cells[-2].calibration_size == 8


def test_interval_of_a_mean() -> None:
    """Against the normal approximation; none from few prompts, where four right answers would be certainty."""
    scores = {"a": [1.0] * 50 + [0.0] * 50}
    low, high = interval(scores, 4000, 0) or (0, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert interval({"a": [1.0] * 9}, 500, 0) is None
    assert interval(scores, 500, 3) == interval(scores, 500, 3)


def test_differences_are_paired() -> None:
    """Two rows that fail at the same prompts differ nowhere, however much the scores spread."""
    records = [{"task": "a", "index": i, "score": float(i % 2)} for i in range(20)]
    assert summary.difference(records, records, 500, 0) == {"mean": 0, "low": 0, "high": 0}
    worse = [record | {"score": 0.0} for record in records]
    found = summary.difference(worse, records, 2000, 0)
    assert found["mean"] == -0.5 and -0.8 < found["low"] < -0.5 < found["high"] < -0.2


def test_looks_are_called_looks() -> None:
    """A row by pages has its looks in a column of its own, and none of its figures is a recomputation."""
    config = config_of(sweep={"policies": ["snapkv"], "recall": [{"kv_recall_rest": "v2"}]})
    samples = run.samples_for(config, None, 1)
    cells = cells_of(config.sweep)
    assert cells[-1].label == "+pages rest v2"
    shape = summary.ModelShape(kv_heads=2)
    rows = []
    for cell in cells[1:]:
        entry = {"task": "single", "score": 1.0, "completion_tokens": 5, "prompt_tokens": 96, "calibration_size": None}
        entry |= {"recall": cell.recall is not None, "report": report_of({"kv_budget": 64}) | {"pages_read": 3}}
        figures = {"96": {"all": summary.figures([entry], shape, 100, 0)}}
        fields = ("label", "policy", "budget", "thresholds", "recall")
        rows.append({name: getattr(cell, name) for name in fields} | {"lengths": figures})
    head, _, *lines = report._costs({"cells": rows, "tasks": []}, "96").splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    of = {line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")] for line in lines}
    recompute, look = columns.index("recompute, per head"), columns.index("look, per head")
    assert of["+CaliDrop .70/.85"][recompute] and not of["+CaliDrop .70/.85"][look]
    assert of["+pages rest v2"][look] and not of["+pages rest v2"][recompute]
    assert samples


def test_prompts_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time they come from the cache, equal; another seed is made anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = "benchmarks/small_model/smooth"

    def asked(seed: int) -> list[Sample]:
        tasks = [{"suite": "ruler", "names": ["vt"], "lengths": [900], "count": 2, "seed": seed}]
        return run.samples_for(config_of(tasks=tasks), tokenizer, None)

    first = asked(1)
    assert len(list((tmp_path / "vllm_calidrop" / "prompts").iterdir())) == 1
    monkeypatch.setattr(run, "samples_of", lambda *arguments: pytest.fail("made again"))
    assert asked(1) == first
    with pytest.raises(pytest.fail.Exception, match="made again"):
        asked(2)


def test_a_server_that_still_boots_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens at first; then the stub does. Without patience the error is one sentence."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def ask(patience: float) -> str:
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", Client(patience=patience))
        try:
            return await endpoint.model()
        finally:
            await endpoint.close()

    with pytest.raises(SystemExit, match=r"no server answers at http://127\.0\.0\.1"):
        asyncio.run(ask(0))
    started: list[Stub] = []
    later = threading.Timer(1.5, lambda: started.append(Stub(lambda body: "yes", port=port).__enter__()))
    later.start()
    try:
        assert asyncio.run(ask(60)) == "stub"
    finally:
        later.join()
        started[0].__exit__()
    assert "waiting for the server at" in capsys.readouterr().err


def test_store_refuses_a_second_answer(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        store.append({"key": "a"})
        with pytest.raises(AssertionError, match="twice"):
            store.append({"key": "a"})
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {"key": "a"}
