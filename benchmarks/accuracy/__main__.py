"""Runs a sweep described by one TOML file and writes its report.

    python -m benchmarks.accuracy benchmarks/accuracy/configs/readme.toml
    python -m benchmarks.accuracy my.toml --base-url http://127.0.0.1:8000/v1

Interrupt it at any time: the same command goes on where it stopped. Results lie in benchmarks/accuracy/results/NAME
(or --out): results.jsonl, summary.json, report.md and pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.accuracy import config as configuration
from benchmarks.accuracy import report, run, server, summary
from benchmarks.accuracy.cells import cells_of
from benchmarks.accuracy.config import Config
from benchmarks.accuracy.models import source_of
from benchmarks.accuracy.store import read
from benchmarks.extras import need

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--base-url", help="ask this server (ends in /v1) instead of starting one")
    parser.add_argument("--model", help="the name to ask for (default: the first the server lists)")
    parser.add_argument("--tokenizer", help="tokenizer of the served model (default: server.tokenizer or server.model)")
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/accuracy/results/NAME)")
    parser.add_argument("--limit", type=int, help="only so many samples of each task and length")
    parser.add_argument("--dry-run", action="store_true", help="count the requests, estimate the time, ask nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report from what is stored")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server started here is stopped
    config = configuration.load(args.config)
    folder = args.out or RESULTS / config.name
    served = config.server
    tokenizer: str | None = args.tokenizer or (served.tokenizer or served.model if served else None)
    samples = run.samples_for(config, tokenizer, args.limit)
    if args.dry_run:
        print(_estimate(config, len(samples), folder))
        return 0
    need("matplotlib", "rapidfuzz", "rouge_score")
    failures: list[str] = []
    if not args.report_only:
        if args.base_url is not None:
            serving: AbstractContextManager[str] = nullcontext(args.base_url)
        elif served is not None:
            serving = server.serving(served, folder / "server.log")
        else:
            parser.error("the configuration has no [server]: give --base-url")
        _claim(config, folder, args.base_url)
        with serving as base_url:
            failures = asyncio.run(run.execute(config, samples, base_url, folder, args.model))
    write_report(config, samples, folder)
    print(f"{folder / 'report.md'}")
    for line in failures[:20]:
        print("failed:", line, file=sys.stderr)
    if failures:
        print(f"{len(failures)} requests failed; the same command asks them again", file=sys.stderr)
    return bool(failures)


def write_report(config: Config, samples: list[Any], folder: Path) -> None:
    from benchmarks.accuracy import plots

    figures = summary.summarize(config, samples, folder)
    figures["run"] = about = json.loads((folder / "run.json").read_text())
    (folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    pictures = plots.draw(figures, folder)
    (folder / "report.md").write_text(report.markdown(figures, about, config.layout, pictures))


def _claim(config: Config, folder: Path, base_url: str | None) -> None:
    """Notes what is measured; refuses to mix two models' or modes' answers in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = config.server.model if config.server else base_url
    about = {
        "model": model,
        "fingerprint": run.fingerprint(config.server.model) if config.server else None,
        "mode": config.client.mode,
        "source": source_of(config.server.model) if config.server else None,
        "versions": _versions() if base_url is None else {},
    }
    path = folder / "run.json"
    if path.exists() and (folder / "results.jsonl").exists():
        before = json.loads(path.read_text())
        for name in ("model", "fingerprint", "mode"):
            if before[name] != about[name]:
                raise SystemExit(f"{folder} holds answers of {name} {before[name]}, this is {about[name]}: use --out")
    path.write_text(json.dumps(about, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("vllm", "vllm-calidrop", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _estimate(config: Config, samples: int, folder: Path) -> str:
    """Requests of the run, and the time they take at the speed stored runs had."""
    requests = samples * len(cells_of(config.sweep))
    text = f"{samples} prompts x {len(cells_of(config.sweep))} cells = {requests} requests"
    runs = read(folder / "runs.jsonl")
    asked, seconds = sum(entry["asked"] for entry in runs), sum(entry["seconds"] for entry in runs)
    if not asked:
        return f"{text}; run once with --limit 2 to learn how long that takes"
    minutes = requests * seconds / asked / 60
    bound = f" (stops after {config.max_minutes:g})" if config.max_minutes else ""
    return f"{text}; {asked} were asked in {seconds:.0f} s before: about {minutes:.0f} minutes{bound}"


if __name__ == "__main__":
    sys.exit(main())
