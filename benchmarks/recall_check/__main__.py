"""Would recall by pages work on this model and these prompts? Measured offline on each layer's attention.

    python -m benchmarks.recall_check --model MODEL --prompts prompts.jsonl     # lines with a "prompt", or a text file
    python -m benchmarks.recall_check --model benchmarks/small_model/smooth     # the small model's own language
    python -m benchmarks.recall_check --synthetic                               # outlier channels, diffuse attention

noise: the sketch's error of a logit; spread: standard deviation of the logits over the evicted tokens. Unread mass:
share of the attention on evicted pages that a look leaves unread. Errors are relative, of one layer's attention output:
with nothing recalled, with pages (look gate and stale state), with a page buffer, with the paper's rule, which reads
all, and with 2-bit keys and values and nothing read. Read: part of the evicted KV per step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recall_check import synthetic
from benchmarks.recall_check.evaluate import Figures, LayerKV, Rule, evaluate
from vllm_calidrop.algorithm.policies import POLICIES, Needs, ScoreInputs
from vllm_calidrop.algorithm.policies.h2o import add_column_sums
from vllm_calidrop.settings.request import RequestSettings

WAYS = ("none", "pages, look always", "pages", "buffer", "all", "2 bits")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a Hugging Face model directory")
    parser.add_argument("--prompts", type=Path, help=".jsonl with a `prompt` per line, or one text")
    parser.add_argument("--count", type=int, default=4, help="prompts used at most")
    parser.add_argument("--length", type=int, default=960, help="tokens: longer prompts are cut; of the small language")
    parser.add_argument("--steps", type=int, default=32, help="decode steps looked at, a greedy continuation")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="snapkv")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--spread", type=float, default=1.5, help="of the synthetic logits")
    for field in dataclasses.fields(Rule):
        kind = float if field.name == "top_p" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = parser.parse_args()
    rule = Rule(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rule)})
    if args.synthetic:
        print(synthetic_table(args, rule))
    elif args.model is None:
        parser.error("--model or --synthetic")
    else:
        print(model_table(args, rule))


def synthetic_table(args: argparse.Namespace, rule: Rule) -> str:
    """Errors against eps and k, and with top-p."""
    tried = [dataclasses.replace(rule, eps=eps, pages=k) for k in (4, 16, 64) for eps in (0.02, 0.005, 0.001)]
    tried += [dataclasses.replace(rule, top_p=p, pages=10**6) for p in (0.5, 0.8, 0.9, 0.95)]
    rows = []
    for each in tried:
        figures = Figures()
        for seed in range(args.count):
            made = synthetic.layer(args.length, args.budget, args.steps, args.spread, seed)
            evaluate(made, args.length, made.keys.shape[-1] ** -0.5, each, figures)
        name = f"eps {each.eps:g}, k {each.pages}" if each.top_p is None else f"top-p {each.top_p:g}"
        rows.append([name, *_cells(figures)])
    return _table(["rule", *_HEAD], rows)


def model_table(args: argparse.Namespace, rule: Rule) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.recall_check import capture

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    by_layer: defaultdict[int, Figures] = defaultdict(Figures)
    for text in _prompts(args):
        prompt = tokenizer(text)["input_ids"][: args.length]
        if len(prompt) <= args.budget:
            continue
        capture.run(
            model,
            prompt + capture.continuation(model, prompt, args.steps),
            _listener(args.policy, args.budget, len(prompt), rule, by_layer),
        )
    assert by_layer, "every prompt is within the budget"
    rows = [[str(layer), *_cells(by_layer[layer])] for layer in sorted(by_layer)]
    return _table(["layer", *_HEAD], rows)


def _listener(
    policy: str, budget: int, prompt_len: int, rule: Rule, by_layer: dict[int, Figures]
) -> Callable[[int, Tensor, Tensor, Tensor, float], None]:
    def hear(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        heads = len(keys)
        kept, evicted = _selection(policy, budget, queries[:, :prompt_len], keys[:, :prompt_len], scale)
        decode = queries[:, prompt_len:].unflatten(0, (heads, -1)).permute(2, 0, 1, 3)
        evaluate(LayerKV(decode, keys, values, kept, evicted), prompt_len, scale, rule, by_layer[index])

    return hear


def _selection(policy: str, budget: int, queries: Tensor, keys: Tensor, scale: float) -> Any:
    """The engine's own policies with their defaults; queries [Hq, P, D], keys [H, P, D]."""
    settings = RequestSettings(kv_budget=budget)
    by_token = queries.transpose(0, 1)
    prompt_len, needs = keys.shape[1], POLICIES[policy].needs

    def sums_from(first: int) -> Tensor:
        sums = torch.zeros(keys.shape[:2])
        add_column_sums(sums, by_token[first:], keys, first, scale)
        return sums

    window_queries = by_token[-settings.kv_window :]
    return POLICIES[policy].select(
        ScoreInputs(
            prompt_len=prompt_len,
            num_kv_heads=keys.shape[0],
            budget=budget,
            window=settings.kv_window,
            sinks=settings.kv_sinks,
            pool_kernel=settings.kv_pool_kernel,
            scale=scale,
            device=keys.device,
            keys=keys if Needs.KEYS in needs else None,
            window_queries=window_queries if Needs.WINDOW_QUERIES in needs else None,
            window_sums=sums_from(prompt_len - settings.kv_window) if Needs.WINDOW_SUMS in needs else None,
            column_sums=sums_from(0) if Needs.COLUMN_SUMS in needs else None,
        ),
        prompt_len - budget,
    )


def _prompts(args: argparse.Namespace) -> Iterable[str]:
    if args.prompts is None:
        from benchmarks.small_model.language import TASKS, make

        return [make(TASKS[seed % len(TASKS)], args.length, seed).prompt for seed in range(args.count)]
    text = args.prompts.read_text()
    if args.prompts.suffix == ".jsonl":
        found = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
        random.Random(0).shuffle(found)
        return found[: args.count]
    return [text]


_HEAD = ["spread", "noise / spread", "evicted mass", "unread mass (95 %)"]
_HEAD += [f"error: {way}" for way in WAYS] + [f"read: {way}" for way in WAYS if way not in ("none", "2 bits")]


def _cells(figures: Figures) -> list[str]:
    cells = [f"{figures.mean('spread'):.2f}", f"{figures.mean('noise'):.2f}", f"{figures.mean('evicted mass'):.3f}"]
    cells.append(f"{figures.mean('unread'):.4f} ({figures.quantile('unread', 0.95):.4f})")
    cells += [f"{figures.mean(f'error {way}'):.4f}" for way in WAYS]
    return cells + [f"{figures.mean(f'read {way}'):.4f}" for way in WAYS if way not in ("none", "2 bits")]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
