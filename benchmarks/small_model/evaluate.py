"""Exact match by task and prompt length with Hugging Face's generate (full KV, greedy), and query similarity.

    python -m benchmarks.small_model.evaluate benchmarks/small_model/smooth --count 200 --json smooth.json

An answer counts when every word of it, `<end>` included, is right. Query similarity is cos(q_t, q_{t-1})
after RoPE while the answer is written: the mean over items, answer words and query heads, by layer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.small_model import language

Items = list[language.Sample]
SEED = 10_000  # first seed of the test items; training and its own validation use others


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Items, size: int) -> float:
    """Share of items answered exactly; all prompts are equally long, so none is padded."""
    right = 0
    for first in range(0, len(items), size):
        part = items[first : first + size]
        prompts = tokenizer([s.prompt for s in part], return_tensors="pt")
        answers = tokenizer([s.answer for s in part]).input_ids
        longest = max(map(len, answers))
        out = model.generate(**prompts, max_new_tokens=longest, do_sample=False)
        for row, answer in zip(out[:, prompts.input_ids.shape[1] :].tolist(), answers, strict=True):
            right += row[: len(answer)] == answer  # an answer is closed by `<end>`: nothing of it follows
    return right / len(items)


@torch.no_grad()
def forced_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Items) -> float:
    """The same figure from one forward pass per sample: greedy is exact iff every argmax is right."""
    right = 0
    for sample in items:
        ids = tokenizer(f"{sample.prompt} {sample.answer}", return_tensors="pt").input_ids
        length = len(sample.answer.split())
        guess = model(ids[:, :-1], logits_to_keep=length).logits.argmax(-1)
        right += guess.tolist() == ids[:, -length:].tolist()
    return right / len(items)


@torch.no_grad()
def query_cosine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Items) -> list[float]:
    """Mean cos(q_t, q_{t-1}) over the answers' query positions, by layer."""
    config, seen = model.config, []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
        for layer in model.model.layers
    ]
    total, count = torch.zeros(config.num_hidden_layers), 0
    for sample in items:
        ids = tokenizer(f"{sample.prompt} {sample.answer}", return_tensors="pt").input_ids[:, :-1]
        length = len(sample.answer.split())
        seen.clear()
        model(ids)
        cos, sin = model.model.rotary_emb(seen[0], torch.arange(ids.shape[1])[None])
        for layer, out in enumerate(seen):
            q = out.view(1, ids.shape[1], config.num_attention_heads, config.head_dim).transpose(1, 2)
            q = apply_rotary_pos_emb(q, q, cos, sin)[0][0, :, -length:].float()  # [H, answer positions, D]
            total[layer] += F.cosine_similarity(q[:, 1:], q[:, :-1], dim=-1).mean(0).sum()
        count += length - 1
    for hook in hooks:
        hook.remove()
    return (total / count).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", nargs="+", default=language.TASKS, choices=language.TASKS)
    parser.add_argument("--tokens", nargs="+", type=int, default=(256, 512, 960), help="prompt lengths")
    parser.add_argument("--count", type=int, default=200, help="items per task and length")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--forced", action="store_true", help="one forward pass per item")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    start = time.time()
    figures: dict[str, Any] = {"exact_match": {}, "query_cosine": {}}
    head = "".join(f"{n:>8}" for n in args.tokens)
    print(f"{'tokens':18}{head}   query cosine by layer, longest prompts")
    for task in args.tasks:
        scores = {}
        for n in args.tokens:
            items = [language.make(task, n, args.seed + i) for i in range(args.count)]
            if args.forced:
                scores[n] = forced_match(model, tokenizer, items)
            else:
                scores[n] = exact_match(model, tokenizer, items, args.batch)
        cosine = query_cosine(model, tokenizer, items[:50])
        figures["exact_match"][task], figures["query_cosine"][task] = scores, cosine
        row = "".join(f"{scores[n]:8.3f}" for n in args.tokens)
        print(f"{task:18}{row}   " + " ".join(f"{c:.2f}" for c in cosine), flush=True)
    figures |= {
        "count": args.count,
        "seed": args.seed,
        "dtype": args.dtype,
        "forced": args.forced,
        "seconds": round(time.time() - start),
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
