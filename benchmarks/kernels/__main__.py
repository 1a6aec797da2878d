"""The GPU suite: `python -m benchmarks.kernels [--json FILE]` on a machine with a GPU.

Needs torch, triton, this repository and, if there, xformers; not vLLM. Without a GPU, `TRITON_INTERPRET=1 python -m
benchmarks.kernels --toy` runs all of it at toy size, so that it is known to work before a GPU is there: its times are
those of an interpreter and mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels import bandwidth, correctness, graphs, steps
from benchmarks.kernels.device import describe, let_xformers_be_interpreted
from benchmarks.kernels.resources import CAPABILITIES, SHAPES, ModelShape, all_launches, resources
from benchmarks.kernels.workload import Limits

PARTS = ("correctness", "resources", "bandwidth", "step", "times")
TOY = ModelShape(2, 2, 32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU under Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", choices=SHAPES, default="Llama-3-8B", help="shape of the timed layer")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls; the median is reported")
    parser.add_argument("--pool-gib", type=float, default=8.0, help="pinned memory at most")
    options = parser.parse_args(arguments)
    if options.toy != triton.knobs.runtime.interpret or (not options.toy and not torch.cuda.is_available()):
        sys.exit("a GPU is needed, or TRITON_INTERPRET=1 and --toy together")
    found = run(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if failed := failures(found):
        sys.exit(f"{len(failed)} checks failed")


def failures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Records that say that something is wrong; a bandwidth below its goal is not one of them."""
    wrong = [row for row in found.get("correctness", []) if row["wrong"]]
    steps = [row for row in found.get("step", []) if row["synchronisations"] or row["graph_equals_launch"] is False]
    return wrong + steps


def run(options: argparse.Namespace) -> dict[str, Any]:
    toy = options.toy
    if toy and importlib.util.find_spec("xformers") is not None:
        let_xformers_be_interpreted()
    device = torch.device("cpu" if toy else "cuda")
    shape = TOY if toy else SHAPES[options.model]
    dtype = torch.float32 if toy else getattr(torch, options.dtype)
    free = 2**20 if toy else torch.cuda.mem_get_info()[0]
    limits = Limits(cache=int(free * 0.4), pool=2**20 if toy else int(options.pool_gib * 2**30))
    repeats = 1 if toy else options.repeats
    found: dict[str, Any] = {"machine": describe(device), "model": options.model, "dtype": str(dtype), "toy": toy}
    print(json.dumps(found))
    kind = (device, dtype, limits)
    if "correctness" in options.parts:
        found["correctness"] = table("correctness", correctness.check_all(device, toy))
    if "resources" in options.parts and not toy:
        compiled = (resources(launch, c) for launch in all_launches(shape, dtype) for c in CAPABILITIES)
        found["resources"] = table("resources", (row._asdict() for row in compiled))
    if "bandwidth" in options.parts:
        decodes = ((2, 40),) if toy else ((1, 8192), (8, 1024), (64, 256), (64, 1024), (16, 32768))
        reloads = ((1, 300),) if toy else ((1, 8192), (8, 8192), (1, 131072), (64, 8192))
        rows = [bandwidth.decode_bandwidth(shape, *size, *kind, repeats) for size in decodes]
        codecs = ("none", "int4") if toy else ("none", "fp8", "int8", "int4", "int2")
        rows += [
            bandwidth.reload_bandwidth(shape, *size, *kind, repeats, codec) for size in reloads for codec in codecs
        ]
        found["bandwidth"] = table("bandwidth", iter(rows))
    if "step" in options.parts:
        sizes = ((2, 20, 40),) if toy else ((1, 128, 8064), (64, 512, 7680), (256, 1024, 1024))
        found["step"] = table("step", (graphs.check_step(shape, *size, *kind) for size in sizes))
    if "times" in options.parts:
        batches, contexts = ((2,), (64,)) if toy else ((1, 4, 16, 64), (8192, 32768, 131072))
        budgets = (16,) if toy else (64, 128, 256, 512, 1024)
        rows = [row for c in contexts for b in batches for row in steps.times(shape, b, c, budgets, *kind, repeats)]
        found["times"] = table("times", iter(rows))
    return found


def table(title: str, rows: Any) -> list[dict[str, Any]]:
    """Print a Markdown table of records, row by row as they come, and give them back."""
    print(f"\n## {title}")
    done: list[dict[str, Any]] = []
    columns: list[str] = []
    for row in rows:
        done.append(row)
        if list(row) != columns:
            columns = list(row)
            print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        print("| " + " | ".join(_cell(row[name]) for name in columns) + " |", flush=True)
    return done


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")


if __name__ == "__main__":
    main()
