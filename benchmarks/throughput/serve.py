"""Real servers, side by side: `vllm serve` with each backend, load by vLLM's own benchmark client, in turns."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import threading
import time
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
PEAKS = {
    "running": "vllm:num_requests_running",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "swap_blocks": "calidrop:swap_blocks_used",
}
GAINS = {
    "preemptions": "vllm:num_preemptions_total",
    "bytes_read": "calidrop:bytes_in_total",
    **{name: f"calidrop:{name}_total" for name in ("recomputes", "merges", "plain")},
}
KV_BLOCKS = "blocks of the KV pool"
REFRESH_SECONDS = 0.2  # how often a server's API process reads its engine


def measure(setup: Serving, folder: Path) -> list[dict[str, Any]]:
    """One row per load, variant and repeat; the variants take turns within a repeat."""
    rows = []
    with ExitStack() as stack:
        backends = dict.fromkeys(variant.backend for load in setup.loads for variant in load.variants)
        urls, processes = {}, {}
        for backend in backends:
            others = psutil.Process().children()
            urls[backend] = stack.enter_context(running(_server(setup, backend), folder / f"{backend or 'stock'}.log"))
            (processes[backend],) = (p for p in psutil.Process().children() if p not in others)
        first = setup.loads[0]
        variants = {variant.name: variant for load in setup.loads for variant in load.variants}
        for variant in variants.values():
            # what compiles or is first touched
            _bench(setup, first, variant, urls[variant.backend], seed=-1, prompts=1)
        for load in setup.loads:
            for repeat in range(load.repeats):
                for variant in _turned(load.variants, repeat):
                    before = _processor_seconds(processes[variant.backend])
                    row = _bench(setup, load, variant, urls[variant.backend], repeat, load.prompts)
                    row["processor_seconds"] = _processor_seconds(processes[variant.backend]) - before
                    rows.append({"setup": setup.name, "model": setup.model, "repeat": repeat, **row})
    return rows


def _turned(variants: tuple[Variant, ...], repeat: int) -> tuple[Variant, ...]:
    """Another one goes first in every repeat."""
    first = repeat % len(variants)
    return variants[first:] + variants[:first]


def _processor_seconds(process: psutil.Process) -> float:
    """Of a server and its children: what a run costs, however busy the machine is otherwise."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)


def _server(setup: Serving, backend: str | None) -> Server:
    arguments = ["--block-size", str(BLOCK_SIZE), "--max-model-len", str(setup.max_model_len), "--max-num-seqs", "64"]
    arguments += ["--dtype", dtype()]
    arguments += ["--attention-backend", backend] if backend else []
    arguments += ["--num-gpu-blocks-override", str(setup.blocks)] if setup.blocks else []
    if backend and setup.swap_bytes is not None:
        arguments += ["--additional-config", json.dumps({"calidrop": {"swap_bytes": setup.swap_bytes}})]
    # One thread each: with more threads than idle cores every OpenMP region costs a time slice.
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "CALIDROP_REFRESH_SECONDS": str(REFRESH_SECONDS),
        "VLLM_SERVER_DEV_MODE": "1",  # the prefix cache can be emptied: all variants get the same prompts
        **({"VLLM_PLUGINS": backend} if backend else {}),  # its metrics beside vLLM's, as `calidrop-server` has them
    }
    return Server(model=str(path_of(setup.model)), args=arguments, env=environment, start_timeout=900)


def prompts_of(setup: Serving, load: Load, seed: int, count: int) -> list[str]:
    """The same for all variants. The bundled model gets texts in its language, the others random words."""
    rng = random.Random(f"{setup.name} {load.name} {load.input} {load.concurrency} {seed}")
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
        httpx.post(f"{base}/reset_prefix_cache", timeout=60).raise_for_status()
        with (Path(folder) / "out").open("w") as out, redirect_stdout(out), _watching(base) as seen:
            result = asyncio.run(serve.main_async(arguments))
    assert result["completed"] == prompts, result
    names = ("duration", "output_throughput", "total_token_throughput", "total_input_tokens", "total_output_tokens")
    latencies = {name: value for name, value in result.items() if name.endswith("_ms") and not name.startswith("std")}
    figures = {name: result[name] for name in names}
    sizes = {name: value for name, value in asdict(load).items() if name not in ("name", "variants", "repeats")}
    return {
        "name": load.name, "load": sizes, "variant": variant.name, "machine_load": load_average(),
        **figures, **latencies, **seen,
    }  # fmt: skip


@contextmanager
def _watching(base: str) -> Iterator[dict[str, float]]:
    """Peaks and gains of the server's metrics while the context is open; filled when it closes."""
    seen = dict.fromkeys((*PEAKS, *GAINS), 0.0)
    time.sleep(2 * REFRESH_SECONDS)
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
        time.sleep(2 * REFRESH_SECONDS)
        after = _metrics(base)
        seen.update({name: after.get(metric, 0.0) - before.get(metric, 0.0) for name, metric in GAINS.items()})
        seen["kv_blocks"] = round(seen.pop("kv_usage") * after[KV_BLOCKS])
        seen["swap_bytes"] = seen.pop("swap_blocks") * after.get("calidrop:swap_block_bytes", 0.0)


def _metrics(base: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in httpx.get(f"{base}/metrics", timeout=60).text.splitlines():
        if line.startswith("vllm:cache_config_info"):
            found[KV_BLOCKS] = float(line.split('num_gpu_blocks="')[1].split('"')[0])
        elif line.startswith(("vllm:", "calidrop:")):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found
