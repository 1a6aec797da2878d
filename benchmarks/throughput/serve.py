"""Real servers, side by side: `vllm serve` with each backend, load by vLLM's own benchmark client, in turns."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.accuracy.config import Server
from benchmarks.accuracy.server import serving as running
from benchmarks.small_model.language import TASKS, VOCABULARY, make
from benchmarks.throughput.models import dtype, path_of
from benchmarks.throughput.profiles import Load, Serving, Variant
from benchmarks.throughput.timing import load as load_average

BLOCK_SIZE = 32
# What the servers say of themselves while they are loaded: the largest value seen, and what a counter gained.
PEAKS = {"running": "vllm:num_requests_running", "kv_usage": "vllm:kv_cache_usage_perc"}
GAINS = {"preemptions": "vllm:num_preemptions_total"}


def measure(setup: Serving, folder: Path) -> list[dict[str, Any]]:
    """One row per load, variant and repeat; the variants take turns within a repeat."""
    rows = []
    with ExitStack() as stack:
        backends = dict.fromkeys(variant.backend for variant in setup.variants)
        urls, processes = {}, {}
        for backend in backends:
            others = psutil.Process().children()
            urls[backend] = stack.enter_context(running(_server(setup, backend), folder / f"{backend or 'stock'}.log"))
            (processes[backend],) = (p for p in psutil.Process().children() if p not in others)
        for load in setup.loads:
            for variant in setup.variants:  # what compiles or is first touched
                _bench(setup, load, variant, urls[variant.backend], seed=-1, prompts=min(2, load.prompts))
            for repeat in range(setup.repeats):
                for variant in setup.variants:
                    before = _processor_seconds(processes[variant.backend])
                    row = _bench(setup, load, variant, urls[variant.backend], repeat, load.prompts)
                    row["processor_seconds"] = _processor_seconds(processes[variant.backend]) - before
                    rows.append({"setup": setup.name, "model": setup.model, "repeat": repeat, **row})
            for variant in setup.variants:
                if variant.fields:
                    report = _report(setup, load, variant, urls[variant.backend])
                    for row in rows:
                        if row["load"] == asdict(load) and row["variant"] == variant.name:
                            row["report"] = report
    return rows


def _processor_seconds(process: psutil.Process) -> float:
    """Of a server and its children: what a run costs, however busy the machine is otherwise."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)


def _server(setup: Serving, backend: str | None) -> Server:
    arguments = ["--block-size", str(BLOCK_SIZE), "--max-model-len", str(setup.max_model_len), "--max-num-seqs", "64"]
    arguments += ["--dtype", dtype()]
    arguments += ["--attention-backend", backend] if backend else []
    arguments += ["--num-gpu-blocks-override", str(setup.blocks)] if setup.blocks else []
    arguments += [] if setup.prefix_caching else ["--no-enable-prefix-caching"]
    # One thread each: with more threads than idle cores every OpenMP region costs a time slice.
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    return Server(model=str(path_of(setup.model)), args=arguments, env=environment)


def prompts_of(setup: Serving, load: Load, seed: int, count: int) -> list[str]:
    """The same for all variants. The bundled model gets texts in its language, the others random words."""
    rng = random.Random(f"{setup.name} {load} {seed}")
    words = VOCABULARY[3:]
    beginning = [rng.choice(words) for _ in range(load.shared)]
    prompts = []
    for _ in range(count):
        length = rng.randint(int(load.input * load.spread), load.input) - load.shared
        if setup.model == "small":
            text = make(rng.choice(TASKS), length, rng.randrange(2**31)).prompt.split()[-length:]
        else:
            text = [rng.choice(words) for _ in range(length)]
        prompts.append(" ".join([*beginning, *text]))
    return prompts


def _bench(setup: Serving, load: Load, variant: Variant, url: str, seed: int, prompts: int) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    base = url.removesuffix("/v1")
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        requests.write_text(
            "".join(json.dumps({"prompt": text}) + "\n" for text in prompts_of(setup, load, seed, prompts))
        )
        options = {
            "backend": "openai", "base-url": base, "model": str(path_of(setup.model)), "dataset-name": "custom",
            "dataset-path": str(requests), "custom-output-len": load.output, "num-prompts": prompts,
            "max-concurrency": load.concurrency, "seed": max(seed, 0), "temperature": 0,
            "extra-body": json.dumps(variant.fields), "percentile-metrics": "ttft,tpot,itl",
            "metric-percentiles": "50,95", "ready-check-timeout-sec": 0,
        }  # fmt: skip
        command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        arguments = parser.parse_args(
            [*command, "--ignore-eos", "--skip-chat-template", "--disable-shuffle", "--disable-tqdm"]
        )
        with (Path(folder) / "out").open("w") as out, redirect_stdout(out), _watching(base) as seen:
            result = asyncio.run(serve.main_async(arguments))
    assert result["completed"] == prompts, result
    names = ("duration", "output_throughput", "total_token_throughput", "total_input_tokens", "total_output_tokens")
    latencies = {name: value for name, value in result.items() if name.endswith("_ms") and not name.startswith("std")}
    figures = {name: result[name] for name in names}
    return {
        "load": asdict(load), "variant": variant.name, "machine_load": load_average(), **figures, **latencies, **seen
    }  # fmt: skip


@contextmanager
def _watching(base: str) -> Iterator[dict[str, float]]:
    """Peaks and gains of the server's metrics while the context is open; filled when it closes."""
    seen = dict.fromkeys((*PEAKS, *GAINS), 0.0)
    before, done = _metrics(base), threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            now = _metrics(base)
            for name, metric in PEAKS.items():
                seen[name] = max(seen[name], now.get(metric, 0.0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        after = _metrics(base)
        seen.update({name: after.get(metric, 0.0) - before.get(metric, 0.0) for name, metric in GAINS.items()})


def _metrics(base: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in httpx.get(f"{base}/metrics", timeout=60).text.splitlines():
        if line.startswith("vllm:"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _report(setup: Serving, load: Load, variant: Variant, url: str) -> dict[str, float]:
    """How often some requests of this load recomputed, and what they read: from the server's own reports."""
    totals: dict[str, float] = dict.fromkeys(("recomputes", "merges", "plain", "group_reads", "bytes_read"), 0)
    count, tokens = 4, 0
    for prompt in prompts_of(setup, load, 1000, count):
        body = {"model": str(path_of(setup.model)), "prompt": prompt, "max_tokens": load.output, "temperature": 0}
        answer = httpx.post(f"{url}/completions", json={**body, "ignore_eos": True, **variant.fields}, timeout=600)
        report = answer.raise_for_status().json()["calidrop"][0]
        tokens += answer.json()["usage"]["completion_tokens"]
        for name in totals:
            totals[name] += report[name]
    decisions = totals["recomputes"] + totals["merges"] + totals["plain"]
    return {
        "recompute_rate": totals["recomputes"] / decisions if decisions else 0.0,
        "merge_rate": totals["merges"] / decisions if decisions else 0.0,
        "bytes_read_per_output_token": totals["bytes_read"] / tokens,
    }
