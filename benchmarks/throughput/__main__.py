"""Measures everything of a profile and writes results.json, report.md and pictures.

    python -m benchmarks.throughput --quick
    python -m benchmarks.throughput                         # within an hour on two quiet cores
    python -m benchmarks.throughput --together              # the servers beside everything else: half of that
    python -m benchmarks.throughput --quick --parts ops,steps
    python -m benchmarks.throughput --report-only

Everything is compared side by side, in turns, within one run; every row says how busy the machine was otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.throughput.profiles import PROFILES
from benchmarks.throughput.timing import load

RESULTS = Path(__file__).parents[1] / "results" / "throughput"
PARTS = ("ops", "steps", "profile", "compaction", "memory", "pool", "serve")
# Large pages, where the system gives them on request: otherwise two equal engines differ by a sixth, because of where
# their weights happen to lie in memory. Not where memory is measured: a heap of large pages is rounded up to them.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--setups", help="only these setups of the part `serve`, by name, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--together", action="store_true", help="run the part `serve` beside the others")
    parser.add_argument("--report-only", action="store_true", help="write report and pictures from what is stored")
    parser.add_argument("--one-part", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    profile = "quick" if args.quick else "full"
    if args.one_part:
        part, file = args.one_part
        Path(file).write_text(json.dumps(_measure(part, profile, args.setups, args.out)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "results.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    failed = []
    lock = threading.Lock()

    def run(parts: list[str]) -> None:
        for part in parts:
            started = time.monotonic()
            setups = [args.setups] if args.setups or part != "serve" else [s.name for s in PROFILES[profile].serving]
            found = [_in_its_own_process(part, profile, args.out, some) for some in setups]
            if None in found:
                failed.append(part)
                continue
            with lock:
                results[part] = [row for rows in found for row in rows] if part == "serve" else found[0]
                results.setdefault("runs", {})[part] = {
                    "profile": profile, "seconds": round(time.monotonic() - started), "load_at_end": load()
                }  # fmt: skip
                results["machine"] = _machine()
                stored.write_text(json.dumps(results, indent=1) + "\n")

    parts = [] if args.report_only else args.parts.split(",")
    assert set(parts) <= set(PARTS), parts
    alone = [part for part in parts if args.together and part == "serve"]
    beside = threading.Thread(target=run, args=(alone,))
    beside.start()
    run([part for part in parts if part not in alone])
    beside.join()
    from benchmarks.throughput import report

    print(report.write(results, args.out))
    for part in failed:
        print(f"part {part} failed; its log: {args.out / 'logs' / part}.log", file=sys.stderr)
    return bool(failed)


def _in_its_own_process(part: str, profile: str, out: Path, setups: str | None) -> Any:
    """Each part sets vLLM up its own way, and gives all its memory back."""
    log = out / "logs" / f"{part}.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file, log.open("a") as output:
        command = [sys.executable, "-m", "benchmarks.throughput", "--one-part", part, file.name, "--out", str(out)]
        command += ["--quick"] if profile == "quick" else []
        command += ["--setups", setups] if setups else []
        print(f"{part} {setups or ''} ...", flush=True)
        environment = {**os.environ, **ENVIRONMENT, **({} if part == "memory" else LARGE_PAGES)}
        run = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
        return json.load(file) if run.returncode == 0 else None


def _measure(part: str, name: str, setups: str | None, out: Path) -> Any:
    profile = PROFILES[name]
    if part == "ops":
        from benchmarks.throughput import ops

        return ops.measure(profile.operator_repeats)
    if part == "compaction":
        from benchmarks.throughput import compaction

        return compaction.measure("llama-2x1024", profile.compaction_lengths, profile.compaction_repeats)
    if part == "pool":
        from benchmarks.throughput import pool

        return pool.measure(profile.pool)
    if part == "memory":
        from benchmarks.throughput import memory

        return memory.measure("llama-2x1024", profile.memory_length)
    if part in ("steps", "profile"):
        from benchmarks.throughput import steps

        if part == "profile":
            return steps.profile(next(iter(profile.step_lengths)), 1024, profile.steps)
        return [
            row for model, sizes in profile.step_lengths.items() for row in steps.measure(model, sizes, profile.steps)
        ]
    from benchmarks.throughput import serve

    chosen = [s for s in profile.serving if setups is None or s.name in setups.split(",")]
    return [row for setup in chosen for row in serve.measure(setup, out / "logs")]


def _machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = {name: version(name) for name in ("vllm", "torch", "vllm-calidrop")}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads_per_engine": 1, **versions}


if __name__ == "__main__":
    sys.exit(main())
