"""The paper's preliminary figures (Fig. 1) for any Hugging Face model, without a server.

    python -m benchmarks.accuracy.figure1 benchmarks/accuracy/configs/readme.toml --count 40

Over the prompts of a configuration, each followed by its answer: how alike queries are by their distance, and the L1
error of the attention output at the first token after the prompt, by layer, before and after calibration with the
query of one of the 0 to 9 tokens before it. Writes figure1.json and PNGs. Eviction is the tests' reference (SnapKV).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.accuracy import config as configuration
from benchmarks.accuracy import plots, run
from tests.reference.attention import attention_state, cosine, merge
from tests.reference.policies import select
from tests.reference.settings import Settings

LAGS = 32
FARTHEST = 9  # the stored query is of a token at most so far back


class Layer(NamedTuple):
    """After RoPE: q [kv_heads, group, T, head_dim], k and v [kv_heads, T, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Watched:
    """A causal language model whose attention shows its inputs, whatever its family."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._layers: list[Layer] = []
        AttentionInterface.register("watched", self._attention)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="watched").eval()

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        q, k, v = query[0].float(), key[0].float(), value[0].float()
        q = q.view(k.shape[0], -1, *q.shape[1:])
        self._layers.append(Layer(q, k, v, rest.get("scaling") or q.shape[-1] ** -0.5))
        return sdpa_attention_forward(module, query, key, value, mask, **rest)

    @torch.inference_mode()
    def layers(self, ids: list[int]) -> list[Layer]:
        self._layers = []
        self.model(torch.tensor([ids], device=self.model.device), use_cache=False)
        return self._layers


def cosine_by_distance(layer: Layer, prompt: int) -> Tensor:
    """Mean over heads and answer positions t >= prompt of cos(q_t, q_{t - lag}), lag = 1 .. LAGS: [LAGS]."""
    q = layer.q.flatten(0, 1)
    later = q[:, prompt:]
    means = [
        F.cosine_similarity(later, q[:, prompt - lag : q.shape[1] - lag], dim=-1).mean() for lag in range(1, LAGS + 1)
    ]
    return torch.stack(means)


def calibration_error(layer: Layer, prompt: int, distance: int, settings: Settings) -> tuple[float, float, float]:
    """L1 error of the output at position `prompt`, mean over heads and dimensions: with the kept tokens alone, and with
    the evicted ones' state for the query `distance` back. Last: the cosine of the two queries."""
    q, k, v, scale = layer
    chosen = select(q[:, :, :prompt], k[:, :prompt], scale, settings)
    now, then = q[:, :, prompt], q[:, :, prompt - distance]

    def state(query: Tensor, positions: Tensor) -> Any:
        at = positions.unsqueeze(-1).expand(-1, -1, k.shape[-1])
        return attention_state(query, k.gather(1, at), v.gather(1, at), scale)

    itself = torch.full((k.shape[0], 1), prompt)
    kept = state(now, torch.cat([chosen.kept, itself], dim=1))
    true = attention_state(now, k[:, : prompt + 1], v[:, : prompt + 1], scale).out
    calibrated = merge(kept, state(then, chosen.evicted)).out
    before, after = ((out - true).abs().mean().item() for out in (kept.out, calibrated))
    return before, after, cosine(now, then).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", help="default: server.model")
    parser.add_argument("--count", type=int, default=5, help="prompts of each task and length")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument(
        "--heatmap", nargs=2, type=int, metavar=("LAYER", "HEAD"), help="default: the middle layer's first"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="default: benchmarks/accuracy/results/figure1")
    args = parser.parse_args()
    config = configuration.load(args.config)
    name: str | None = args.model or (config.server.model if config.server else None)
    if name is None:
        parser.error("the configuration has no [server]: give --model")
    folder = args.out or Path(__file__).parent / "results" / "figure1"
    folder.mkdir(parents=True, exist_ok=True)

    watched = Watched(name, getattr(torch, args.dtype))
    settings = Settings(kv_budget=args.budget)
    cosines, errors, used = [], [], 0
    heatmap: np.ndarray | None = None
    for sample in run.samples_for(config, name, args.count):
        head = watched.tokenizer(sample.prompt + sample.prefix).input_ids
        tail = watched.tokenizer(" " + " ".join(sample.answers), add_special_tokens=False).input_ids
        if len(tail) < 2 or len(head) <= max(args.budget, LAGS):
            continue
        layers = watched.layers(head + tail[:-1])
        distance = random.Random(f"{config.seed}/{sample.id}").randint(0, FARTHEST)
        cosines.append(torch.stack([cosine_by_distance(layer, len(head)) for layer in layers]).numpy())
        errors.append([calibration_error(layer, len(head), distance, settings) for layer in layers])
        used += 1
        if heatmap is None:
            which, row = args.heatmap or (len(layers) // 2, 0)
            q = layers[which].q.flatten(0, 1)[row]
            q = F.normalize(q[50:150] if q.shape[0] >= 150 else q[-100:], dim=-1)
            heatmap, place = (q @ q.T).numpy(), (which, row)
    if heatmap is None:
        raise SystemExit("no prompt is longer than the budget")

    figures = {
        "model": name,
        "prompts": used,
        "budget": args.budget,
        "cosine_by_distance": _rounded(np.mean(cosines, 0)),
        "l1_evicted": _rounded(np.mean(errors, 0)[:, 0], 6),
        "l1_calibrated": _rounded(np.mean(errors, 0)[:, 1], 6),
        "cosine_of_stored_query": _rounded(np.mean(errors, 0)[:, 2]),
    }
    (folder / "figure1.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, heatmap, place, folder)
    print(folder)


def _rounded(values: np.ndarray, digits: int = 4) -> Any:
    return np.asarray(values, dtype=np.float64).round(digits).tolist()


def draw(figures: dict[str, Any], heatmap: np.ndarray, place: tuple[int, int], folder: Path) -> None:
    figure, ax = plt.subplots(figsize=(3.6, 3.0))
    image = ax.imshow(heatmap, vmin=-1, vmax=1, cmap="RdBu_r", extent=(50, 150, 150, 50))
    ax.grid(False)
    ax.set(xlabel="position", ylabel="position", title=f"cosine of queries, layer {place[0]}, head {place[1]}")
    figure.colorbar(image, ax=ax, shrink=0.85)
    plots.save(figure, folder, "query_heatmap.png")

    by_layer = figures["cosine_by_distance"]
    figure, ax = plt.subplots(figsize=(4.4, 3.0))
    for layer, values in enumerate(by_layer):
        colour = plt.get_cmap("viridis")(layer / max(1, len(by_layer) - 1) * 0.9)
        label = f"layer {layer}" if len(by_layer) <= 8 or layer in (0, len(by_layer) - 1) else None
        ax.plot(range(1, LAGS + 1), values, color=colour, label=label)
    ax.set(xlabel="distance, tokens", ylabel="cosine of queries", ylim=(min(0, np.min(by_layer)), 1.02))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plots.save(figure, folder, "query_cosine.png")

    figure, ax = plt.subplots(figsize=(4.4, 3.0))
    layers = np.arange(len(by_layer))
    if len(layers) <= 12:
        ax.bar(layers - 0.2, figures["l1_evicted"], 0.38, color="#d55e00", label="evicted only")
        ax.bar(layers + 0.2, figures["l1_calibrated"], 0.38, color="#009e73", label="calibrated")
    else:
        ax.plot(layers, figures["l1_evicted"], color="#d55e00", label="evicted only")
        ax.plot(layers, figures["l1_calibrated"], color="#009e73", label="calibrated")
    ax.set(xlabel="layer", ylabel="L1 error of the attention output")
    ax.set_title(f"SnapKV, KV size {figures['budget']}, {figures['prompts']} prompts", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    plots.save(figure, folder, "l1_error.png")


if __name__ == "__main__":
    main()
