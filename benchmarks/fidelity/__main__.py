"""How far do next-token distributions move when evicted KV is recalled in some way, or not at all?

    python -m benchmarks.fidelity --model qwen2.5-coder-0.5b --length 2048
    python -m benchmarks.fidelity --model smollm2-135m --length 2048 --base-url http://127.0.0.1:8000/v1

Full KV answers each prompt greedily; every row of --rows is then made to give that answer and says at each token what
it would have said (teacher forcing). The bundled prompts are natural text (data/README.md); `--split tune` is for
choosing settings, `report` for figures. The engine runs in this process unless --base-url names a server, which must
have been started with `--logits-processors vllm_calidrop.forcing:ForcedTokens`.

Interrupt it at any time: the same command goes on where it stopped, and a row that was added asks only its own
questions. Results: benchmarks/fidelity/results/MODEL-LENGTH (or --out): results.jsonl, summary.json, report.md and a
picture, written anew after each prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.accuracy.models import folder_of, source_of
from benchmarks.accuracy.run import fingerprint
from benchmarks.accuracy.store import read
from benchmarks.fidelity import report
from benchmarks.fidelity.asking import Asker, Endpoint, FidelityError, Offline
from benchmarks.fidelity.prompts import prompts
from benchmarks.fidelity.rows import load
from benchmarks.fidelity.run import Setup, execute
from benchmarks.fidelity.summary import Shape, summarize
from benchmarks.models import ModelError

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, or a name of `python -m benchmarks.models --list`")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt, the chat template included")
    parser.add_argument("--rows", type=Path, default=HERE / "rows.toml")
    parser.add_argument("--split", choices=("report", "tune"), default="report")
    parser.add_argument("--limit", type=int, help="only the first prompts; they are of different kinds")
    parser.add_argument("--steps", type=int, default=33, help="tokens of an answer at most; the first is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--base-url", help="ask this server (ends in /v1) instead of an engine in this process")
    parser.add_argument("--served-model-name", help="with --base-url: the name to ask for")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report-only", action="store_true", help="write the report from what is stored")
    args = parser.parse_args()
    try:
        _run(args)
    except (FidelityError, ModelError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    rows = load(args.rows)
    name = Path(args.model).name
    suffix = "" if args.split == "report" else f"-{args.split}"
    folder: Path = args.out or HERE / "results" / f"{name}-{args.length}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder_of(args.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.model_max_length = 1 << 40  # what is counted is not yet a prompt
    found = prompts(tokenizer, args.length, args.split, args.limit)
    setup = Setup(name, fingerprint(args.model) or "", args.dtype, args.steps)
    shape = _shape(Path(place), args.dtype)
    about = _about(args)
    start = time.monotonic()

    def asker() -> Asker:
        if args.base_url is not None:
            return Endpoint(args.base_url, args.served_model_name)
        return Offline(place, args.dtype, args.length + args.steps + 64)

    def write() -> None:
        summary = summarize(
            setup, rows, found, read(folder / "results.jsonl"), shape, lambda token: tokenizer.decode([token])
        )
        summary["run"] = about
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report.write(summary, about, folder)

    def after(number: int) -> None:
        write()
        seconds = time.monotonic() - start
        print(f"{number} of {len(found)} prompts, {seconds:.0f} s, {folder / 'report.md'}", file=sys.stderr, flush=True)

    if not args.report_only:
        execute(setup, rows, found, asker, folder, after)
    write()
    print(folder / "report.md")


def _shape(folder: Path, dtype: str) -> Shape:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Shape(config["num_hidden_layers"], kv_heads, head_dim, 4 if dtype == "float32" else 2)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    source = source_of(args.model)
    title = source["title"] if source else Path(args.model).name
    weights = f"{title}, {source['note']}, {source['licence']}" if source else title
    versions = []
    for package in ("vllm", "vllm-calidrop", "torch"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    said = [f"--model {args.model}", f"--length {args.length}"]
    said += [f"--split {args.split}"] if args.split != "report" else []
    said += [f"--rows {args.rows}"] if args.rows != HERE / "rows.toml" else []
    return {
        "title": title,
        "weights": weights,
        "length": args.length,
        "split": args.split,
        "versions": ", ".join(versions) if args.base_url is None else "a server's own versions",
        "machine": platform.machine(),
        "command": f"Command: `python -m benchmarks.fidelity {' '.join(said)}`.",
    }


if __name__ == "__main__":
    sys.exit(main())
