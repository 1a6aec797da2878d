"""Trains the small model: short texts first, then longer ones, then a stage that makes queries smooth.

    python -m benchmarks.small_model.train --out DIRECTORY

One stage per text length; the next begins when the moving answer accuracy passes 0.95, never by time. Every
stage is saved as `<out>/<stage>.pt` and a second start resumes after the last one saved. `plain` is the model
before the smoothness stage, `smooth` the one after it; both are exported beside this file (`--export DIR`:
elsewhere).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.small_model import language
from benchmarks.small_model.export import export
from benchmarks.small_model.model import Llama, Shape
from benchmarks.small_model.muon import Muon

MUON_LR, ADAMW_LR = 0.02, 1.5e-3
OTHER_WEIGHT = 0.1  # loss weight of a word that is not in an answer
SOLVED = 0.95  # moving answer accuracy at which texts get longer
VALIDATION_SEED = 10**6
# The first layers only: layers 2 and 3 retrieve. Penalised too, they bury what they look for under a constant part, and
# no gate on the similarity of queries can tell any more when they need something else (README.md).
SMOOTH_LAYERS = 2
LAGS, TARGET_COSINE, SMOOTH_WEIGHT = (1, 3, 6), 0.9, 0.3


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: ends when solved (`steps` None), or after `steps` with the rate decayed."""

    name: str
    length: int
    batch: int
    share: tuple[float, float] = (0.3, 0.7)
    steps: int | None = None
    rate: tuple[float, float] = (1.0, 1.0)
    smooth: bool = False
    warmup: int = 0


LONG = (0.3, 0.92)
STAGES = (
    Stage("t64", 64, 64, warmup=20),
    Stage("t128", 128, 32),
    Stage("t256", 256, 24),
    Stage("t512", 512, 12, share=LONG),
    Stage("t1152", 1152, 6, share=LONG),
    Stage("plain", 1152, 6, share=LONG, steps=450, rate=(1.0, 0.05)),
    Stage("smooth", 1152, 6, share=(0.5, 0.92), steps=600, rate=(0.7, 0.0), smooth=True, warmup=20),
)


def batch_of(stage: Stage, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and which of them are answers [B, T]."""
    first = (seed * 100_000 + step) * stage.batch
    texts = [language.training_text(stage.length, first + i, stage.share) for i in range(stage.batch)]
    ids = torch.tensor([[language.WORD_ID[word] for word in words] for words, _ in texts])
    return ids, torch.tensor([mask for _, mask in texts])


def roughness(queries: list[Tensor]) -> Tensor:
    """Mean relu(0.9 - cos(q_t, q_{t - lag})) over smoothed layers, heads, lags; queries: per layer [B, T, H, D]."""
    total = torch.zeros(())
    for q in queries[:SMOOTH_LAYERS]:
        unit = F.normalize(q.float(), dim=-1)
        for lag in LAGS:
            total = total + (TARGET_COSINE - (unit[:, lag:] * unit[:, :-lag]).sum(-1)).relu().mean()
    return total / (SMOOTH_LAYERS * len(LAGS))


@torch.no_grad()
def exact_match(model: Llama, task: str, n_tokens: int, count: int) -> tuple[float, list[float]]:
    """Share of answers predicted word for word (as greedy decoding would), and cos(q_t, q_{t-1}) by layer."""
    right, cosine, words = 0, torch.zeros(model.shape.layers), 0
    for i in range(count):
        sample = language.make(task, n_tokens, VALIDATION_SEED + i)
        answer = sample.answer.split()
        text = [language.WORD_ID[word] for word in sample.prompt.split() + answer]
        with torch.autocast("cpu", torch.bfloat16):
            hidden, queries = model(torch.tensor([text[:-1]]))
            guess = model.logits(hidden[0, -len(answer) :]).argmax(-1)
        right += int(guess.tolist() == text[-len(answer) :])
        for layer, q in enumerate(queries):
            tail = q[0, -len(answer) - 1 :].float()
            cosine[layer] += F.cosine_similarity(tail[1:], tail[:-1], dim=-1).mean(-1).sum()
        words += len(answer)
    return right / count, (cosine / words).tolist()


def table(model: Llama, lengths: tuple[int, ...], count: int) -> str:
    head = " ".join(f"{n:>6}" for n in lengths)
    lines = [f"{'tokens':18}{head} | exact match, n = {count} | query cosine by layer"]
    for task in language.TASKS:
        found = [exact_match(model, task, n, count) for n in lengths]
        cosine = " ".join(f"{c:.2f}" for c in found[-1][1])
        lines.append(f"{task:18}" + " ".join(f"{score:6.2f}" for score, _ in found) + " | " + cosine)
    return "\n".join(lines)


class Trainer:
    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        self.model = Llama(Shape(len(language.VOCABULARY)), seed)
        parameters = dict(self.model.named_parameters())
        matrices = [p for name, p in parameters.items() if name.endswith("_proj")]
        others = [p for name, p in parameters.items() if not name.endswith("_proj")]
        self.muon = Muon(matrices, lr=MUON_LR)
        self.adamw = torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.seconds, self.tokens, self.moving, self.steps = 0.0, 0, 0.0, 0

    def set_rate(self, rate: float) -> None:
        for optimiser, lr in ((self.muon, MUON_LR), (self.adamw, ADAMW_LR)):
            for group in optimiser.param_groups:
                group["lr"] = lr * rate

    def step(self, stage: Stage, step: int) -> tuple[float, float, float]:
        """One update; returns answer loss, answer accuracy and roughness of the queries."""
        ids, is_answer = batch_of(stage, step, self.seed)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, queries = self.model(ids[:, :-1])
            logits = self.model.logits(hidden).flatten(0, 1)
        target, answer = ids[:, 1:].flatten(), is_answer[:, 1:].flatten()
        each = F.cross_entropy(logits, target, reduction="none")
        weight = torch.where(answer, 1.0, OTHER_WEIGHT)
        loss = (each * weight).sum() / weight.sum()
        rough = roughness(queries) if stage.smooth else torch.zeros(())
        (loss + SMOOTH_WEIGHT * rough).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad()
        right = (logits.detach().argmax(-1) == target)[answer].float().mean()
        return each.detach()[answer].mean().item(), right.item(), rough.item()

    def run(self, stage: Stage) -> None:
        """Takes up the stage where the last save of it, if any, left it."""
        start = time.time() - self.seconds
        while self.moving < SOLVED if stage.steps is None else self.steps < stage.steps:
            rate = stage.rate[0]
            if stage.steps is not None:
                rate += (stage.rate[1] - stage.rate[0]) * self.steps / stage.steps
            self.set_rate(rate * min(1.0, (self.steps + 1) / (stage.warmup + 1)))
            loss, right, rough = self.step(stage, self.steps)
            self.steps += 1
            self.moving += (right - self.moving) * 0.04
            self.tokens += stage.batch * stage.length
            self.seconds = time.time() - start
            if self.steps % 25 == 0:
                scores = f"loss {loss:.3f} accuracy {self.moving:.3f} rough {rough:.3f}"
                print(f"{stage.name} {self.steps:5} {self.seconds:6.0f} s {scores}", flush=True)
            if self.steps % 100 == 0:
                self.save(stage.name + ".part")
            if self.steps % 300 == 0 and stage.length >= 256:
                n = min(stage.length - 64, 960)
                print(table(self.model, (n // 2, n), 24), flush=True)
        print(
            f"{stage.name}: {self.steps} steps; {self.seconds:.0f} s, {self.tokens / 1e6:.1f} M tokens",
            flush=True,
        )
        self.moving, self.steps = 0.0, 0
        self.save(stage.name)

    def save(self, name: str) -> None:
        saved = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "progress": (self.seconds, self.tokens, self.moving, self.steps),
        }
        torch.save(saved, self.out / f"{name}.pt")

    def load(self, name: str) -> None:
        saved = torch.load(self.out / f"{name}.pt")
        self.model.load_state_dict(saved["model"])
        self.muon.load_state_dict(saved["muon"])
        self.adamw.load_state_dict(saved["adamw"])
        self.seconds, self.tokens, self.moving, self.steps = saved["progress"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where stages are saved")
    parser.add_argument("--export", type=Path, default=Path(__file__).parent, help="of plain/ and smooth/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", choices=[stage.name for stage in STAGES], default=STAGES[-1].name)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.out, args.seed)
    for stage in STAGES:
        if (args.out / f"{stage.name}.pt").exists():
            trainer.load(stage.name)
        else:
            if (args.out / f"{stage.name}.part.pt").exists():
                trainer.load(f"{stage.name}.part")
            trainer.run(stage)
            if stage.length >= 256:
                n = min(stage.length - 64, 960)
                print(table(trainer.model, (n // 2, n), 50), flush=True)
        if stage.name in ("plain", "smooth"):
            export(trainer.model, args.export / stage.name)
        if stage.name == args.until:
            return


if __name__ == "__main__":
    main()
