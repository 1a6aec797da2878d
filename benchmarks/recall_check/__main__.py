"""Would recall by pages work on this model and these prompts? Measured offline on each layer's attention.

    python -m benchmarks.recall_check --model qwen2.5-coder-0.5b --budget 128   # natural prompts, --split tune
    python -m benchmarks.recall_check --model MODEL --prompts prompts.jsonl     # lines with a "prompt", or one text
    python -m benchmarks.recall_check --model benchmarks/small_model/smooth     # the small model's own language
    python -m benchmarks.recall_check --synthetic                               # outlier channels, diffuse attention

The model is a folder or a name of `python -m benchmarks.models --list`. Its chat template is applied to prompts, where
it has one, unless --plain.

noise: the sketch's error of a logit; spread: standard deviation of the logits over the evicted tokens. Unread mass:
share of the attention on evicted pages that a look leaves unread. Errors are relative, of one layer's attention output:
with nothing recalled, with pages (look gate and stale state), with a page buffer, with the paper's rule, which reads
all, and with 2-bit keys and values and nothing read. Read: part of the evicted KV per step.

Errors of single layers find the layers where a rule fails. They do not rank rules as the model's own distributions do:
choose by `python -m benchmarks.fidelity`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.models import folder_of, source_of
from benchmarks.fidelity.prompts import prompts as natural_prompts
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
    parser.add_argument("--model", help="a folder, or a name of `python -m benchmarks.models --list`")
    parser.add_argument("--prompts", type=Path, help=".jsonl with a `prompt` per line, or one text")
    parser.add_argument("--plain", action="store_true", help="without the model's chat template")
    parser.add_argument("--split", choices=("tune", "report"), default="tune", help="of the bundled natural prompts")
    parser.add_argument("--count", type=int, default=4, help="prompts used at most")
    parser.add_argument("--length", type=int, default=960, help="tokens of a prompt at most; the middle is cut")
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
        print(model_report(args, rule))


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


def model_report(args: argparse.Namespace, rule: Rule) -> str:
    """The header, a table by layer and the verdict; progress goes to stderr."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.recall_check import capture

    place = folder_of(args.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.model_max_length = 1 << 40  # what is cut below is not yet a prompt
    found = [ids for ids in _prompts(args, tokenizer) if len(ids) > args.budget]
    if not found:
        raise SystemExit(f"every prompt is within the budget of {args.budget} tokens: nothing would be evicted")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    by_layer: defaultdict[int, Figures] = defaultdict(Figures)
    for prompt in tqdm(found, desc="prompts", unit="prompt"):
        capture.run(
            model,
            prompt + capture.continuation(model, prompt, args.steps),
            _listener(args.policy, args.budget, len(prompt), rule, by_layer),
        )
    source = source_of(args.model)
    name = f"{source['title']} ({source['note']})" if source else args.model
    sizes = [len(prompt) for prompt in found]
    header = (
        f"{name}, {len(found)} prompts of {min(sizes)} to {max(sizes)} tokens, {args.steps} greedy steps each, "
        f"float32; {args.policy}, {args.budget} tokens kept per KV head.\n{_described(rule)}"
    )
    rows = [[str(layer), *_cells(by_layer[layer])] for layer in sorted(by_layer)]
    return "\n\n".join([header, _table(["layer", *_HEAD], rows), verdict(by_layer)])


def _described(rule: Rule) -> str:
    choice = f"top-p {rule.top_p:g}, " if rule.top_p is not None else ""
    return (
        f"Pages: {choice}k {rule.pages}, eps {rule.eps:g}, look gate {rule.theta:g}; buffer of {rule.buffer} pages "
        f"with eps {rule.eps_buffer:g}; the paper's rule (all): theta1 {rule.theta1:g}, theta2 {rule.theta2:g}."
    )


def verdict(by_layer: Mapping[int, Figures]) -> str:
    """In words: which ways of recalling help in every layer, what they read, and where one is worse than none."""
    lines = []
    for way in ("pages", "buffer", "all"):
        errors = {layer: figures.mean(f"error {way}") for layer, figures in by_layer.items()}
        none = {layer: figures.mean("error none") for layer, figures in by_layer.items()}
        worse = [layer for layer in sorted(errors) if errors[layer] > none[layer]]
        error, base = fmean(errors.values()), fmean(none.values())
        read = fmean(figures.mean(f"read {way}") for figures in by_layer.values())
        where = (
            "in no layer" if not worse else f"in {len(worse)} of {len(by_layer)} layers ({', '.join(map(str, worse))})"
        )
        name = {"pages": "pages", "buffer": "pages with the buffer", "all": "the paper's rule"}[way]
        lines.append(
            f"- {name}: mean error {error:.3f} of {base:.3f} with nothing recalled, reading {100 * read:.2f} % of the "
            f"evicted KV per step; worse than nothing recalled {where}."
        )
    missed = {layer: figures.quantile("unread", 0.95) for layer, figures in by_layer.items()}
    worst = max(missed, key=lambda layer: missed[layer])
    lines.append(
        f"- Looks leave most unread in layer {worst}: in one of twenty cases more than {100 * missed[worst]:.0f} % of "
        "the attention."
    )
    return "On this model and these prompts, by the attention outputs of single layers:\n" + "\n".join(lines)


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


def _prompts(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids of at most `count` prompts of at most `length` tokens; the middle of a longer one is left out."""
    if args.prompts is None and tokenizer.chat_template is not None:
        return [prompt.token_ids for prompt in natural_prompts(tokenizer, args.length, args.split, args.count)]
    if args.prompts is None:
        from benchmarks.small_model.language import TASKS, make

        texts = [make(TASKS[seed % len(TASKS)], args.length, seed).prompt for seed in range(args.count)]
    else:
        text = args.prompts.read_text()
        texts = [text]
        if args.prompts.suffix == ".jsonl":
            texts = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
            random.Random(0).shuffle(texts)
    found = []
    for text in texts[: args.count]:
        if tokenizer.chat_template is not None and not args.plain:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(text)["input_ids"]
        if len(ids) > args.length:
            half = args.length // 2
            ids = ids[:half] + ids[len(ids) - (args.length - half) :]
        found.append(ids)
    return found


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
