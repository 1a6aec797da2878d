"""Measures everything of a profile and writes results.json, report.md and pictures.

    python -m benchmarks.throughput --quick                 # about ten minutes
    python -m benchmarks.throughput                         # about an hour
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
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.throughput.profiles import PROFILES
from benchmarks.throughput.timing import load

RESULTS = Path(__file__).parents[1] / "results" / "throughput"
PARTS = ("ops", "compaction", "steps", "profile", "serve")
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
    if not args.report_only:
        for part in args.parts.split(","):
            assert part in PARTS, part
            started = time.monotonic()
            found = _in_its_own_process(part, profile, args)
            if found is None:
                failed.append(part)
                continue
            results[part] = found
            results.setdefault("runs", {})[part] = {
                "profile": profile, "seconds": round(time.monotonic() - started), "load_at_end": load()
            }  # fmt: skip
            results["machine"] = _machine()
            stored.write_text(json.dumps(results, indent=1) + "\n")
    from benchmarks.throughput import report

    print(report.write(results, args.out))
    for part in failed:
        print(f"part {part} failed; its log: {args.out / 'logs' / part}.log", file=sys.stderr)
    return bool(failed)


def _in_its_own_process(part: str, profile: str, args: argparse.Namespace) -> Any:
    """Each part sets vLLM up its own way, and gives all its memory back."""
    log = args.out / "logs" / f"{part}.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file, log.open("w") as output:
        command = [sys.executable, "-m", "benchmarks.throughput", "--one-part", part, file.name, "--out", str(args.out)]
        command += ["--quick"] if profile == "quick" else []
        command += ["--setups", args.setups] if args.setups else []
        print(f"{part} ...", flush=True)
        run = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=output, check=False)
        return json.load(file) if run.returncode == 0 else None


def _measure(part: str, name: str, setups: str | None, out: Path) -> Any:
    profile = PROFILES[name]
    if part == "ops":
        from benchmarks.throughput import ops

        return ops.measure(profile.operator_repeats)
    if part == "compaction":
        from benchmarks.throughput import compaction

        return compaction.measure("llama-8x1024", profile.compaction_lengths, profile.compaction_repeats)
    if part in ("steps", "profile"):
        from benchmarks.throughput import steps

        if part == "profile":
            return steps.profile("llama-8x1024", 1024, profile.steps)
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
