"""Models to measure with: the bundled small one, and Llama shapes near real ones with random weights, made on the fly.

Speed does not depend on the weights' values, except for how often CaliDrop recomputes: that is measured with the
bundled model, which is trained.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

SMALL = Path(__file__).parents[1] / "small_model" / "smooth"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """A Llama. The vocabulary is the bundled tokenizer's, so that its files serve all models."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 16384


SHAPES = {
    "llama-2x1024": Shape(1024, 2816, 2, 16, 4, 64),
    "llama-8x1024": Shape(1024, 2816, 8, 16, 4, 64),
    "llama-2x1024-d128": Shape(1024, 2816, 2, 8, 2, 128),
}


def dtype() -> str:
    """What a model is served in here: without bfloat16 instructions a bfloat16 product takes 3 to 8 times as long as
    one in float32, and all that is compared would disappear beside it."""
    import torch

    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def path_of(name: str) -> Path:
    """The folder of model `name`: `small`, or one of SHAPES, made when first asked for, in the user's cache."""
    if name == "small":
        return SMALL
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm_calidrop" / "models" / name
    if not (folder / "config.json").exists():
        _make(SHAPES[name], folder)
    return folder


def _make(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(SMALL))
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16", **asdict(shape))
    building = folder.with_name(f"{folder.name}.{os.getpid()}")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(building)
    for name in TOKENIZER_FILES:
        shutil.copy(SMALL / name, building)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
