"""Bytes, error of the attention state and reload time of every codec.

    python -m benchmarks.codecs --out benchmarks/codecs/results

Error: |out - exact| / |exact| of the attention state over the evicted set, mean over queries and heads; and the mean
error of its log-sum-exp. Times are of one layer, ratios to codec `none` in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.codecs.keys import SYNTHETIC, Run, evicted_of, synthetic
from benchmarks.codecs.reload import Reload, measure
from benchmarks.small_model.language import TASKS, WORD_ID, make
from vllm_calidrop.algorithm.calibration import attention_state
from vllm_calidrop.evicted.codecs import CODECS, codec_of
from vllm_calidrop.ops.cpp import CppSet
from vllm_calidrop.ops.reference import ReferenceSet

MODEL = "benchmarks/small_model/smooth"
SEED = 20_000


def errors(runs: Iterable[Run]) -> dict[str, dict[str, list[float]]]:
    """By run and codec: [relative error of out, error of lse], mean over runs of the same name."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for run in runs:
        heads, tokens, head_dim = run.keys.shape
        exact = attention_state(run.queries, run.keys, run.values, run.scale)
        for name in list(CODECS)[1:]:
            codec = codec_of(name, head_dim, run.keys.dtype)
            blocks = codec.encode(run.keys, run.values).blocks.flatten(0, 1)
            keys, values = (x.reshape(heads, -1, head_dim)[:, :tokens] for x in codec.decode(blocks))
            state = attention_state(run.queries, keys, values, run.scale)
            out = ((state.out - exact.out).norm(dim=-1) / exact.out.norm(dim=-1)).mean()
            lse = (state.lse - exact.lse).abs().mean()
            found.setdefault(run.name, {}).setdefault(name, []).append([float(out), float(lse)])
    return {
        run: {name: torch.tensor(values).mean(0).tolist() for name, values in by_codec.items()}
        for run, by_codec in found.items()
    }


def small_model_runs(prompts: int, length: int, steps: int) -> Iterable[Run]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for index in range(prompts):
        sample = make(TASKS[index % len(TASKS)], length, SEED + index)
        yield from evicted_of(model, [WORD_ID[word] for word in sample.prompt.split()], steps, budget=64)


def report(figures: dict[str, Any]) -> str:
    lines = ["| codec | bytes per token, D 128 | against bf16 | blocks hold | D 64 | reload, C++ | torch |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name in CODECS:
        wide, small = codec_of(name, 128, torch.bfloat16), codec_of(name, 64, torch.bfloat16)
        lines.append(
            f"| `{name}` | {wide.bytes_per_token(8064):.1f} | {512 / wide.bytes_per_token(8064):.2f} x | "
            f"{wide.tokens_per_block} | {256 / small.bytes_per_token(8064):.2f} x | "
            + " | ".join(
                f"{figures['reload'][op][name] / figures['reload'][op]['none']:.2f}" for op in ("cpp", "torch")
            )
            + " |"
        )
    runs = list(figures["errors"])
    lines += ["", "| codec | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    for name in list(CODECS)[1:]:
        cells = [f"{figures['errors'][run][name][0]:.3f} ({figures['errors'][run][name][1]:.2f})" for run in runs]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8064, help="evicted tokens of the timed sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = [*small_model_runs(given.prompts, 960, 20), *(synthetic(name, seed=0) for name in SYNTHETIC)]
    reload = Reload(given.tokens, kv_heads=8, group=4, head_dim=128)
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "prompts": given.prompts,
        "original_bytes": reload.original_bytes,
        "errors": errors(runs),
        "reload": {
            "cpp": measure(reload, CppSet, given.repeats, given.rounds),
            "torch": measure(reload, ReferenceSet, 1, 1),
        },
    }
    text = report(figures)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "codecs.json").write_text(json.dumps(figures, indent=1) + "\n")
        (given.out / "report.md").write_text(text)


if __name__ == "__main__":
    main()
