"""Writes the trained model as a Hugging Face directory and checks that it computes the same logits.

python -m benchmarks.small_model.export STAGE.pt DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.small_model import language, tokenizer
from benchmarks.small_model.model import Llama, Shape

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=language.WORD_ID[language.PAD],
        bos_token_id=None,
        eos_token_id=language.WORD_ID[language.END],
        dtype="bfloat16",
    )


def weights_of(model: Llama) -> dict[str, torch.Tensor]:
    """The same parameters under Hugging Face's names."""
    weights = {
        "model.embed_tokens.weight": model.embed,
        "lm_head.weight": model.embed,
        "model.norm.weight": model.norm,
    }
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        weights[prefix + "input_layernorm.weight"] = layer.input_norm
        weights[prefix + "post_attention_layernorm.weight"] = layer.post_norm
        weights |= {f"{prefix}self_attn.{name}.weight": getattr(layer, name) for name in ATTENTION}
        weights |= {f"{prefix}mlp.{name}.weight": getattr(layer, name) for name in MLP}
    return {name: weight.detach() for name, weight in weights.items()}


@torch.no_grad()
def export(model: Llama, directory: Path) -> None:
    """bf16 weights, configurations and tokenizer; then the check on the files as written."""
    config = config_of(model.shape)
    hugging = LlamaForCausalLM(config).to(torch.bfloat16)
    hugging.load_state_dict(weights_of(model))
    hugging.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=False
    )
    hugging.save_pretrained(directory)
    tokenizer.build(model.shape.positions).save_pretrained(directory, save_jinja_files=False)

    written = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rounded = Llama(model.shape)
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    ids = torch.randint(0, model.shape.vocab, (2, 300), generator=torch.Generator().manual_seed(0))
    difference = (written(ids).logits - rounded.logits(rounded(ids)[0])).abs().max().item()
    print(f"{directory}: logits differ by at most {difference:.1e} from the training model's")
    assert difference < 1e-3, difference


if __name__ == "__main__":
    state = torch.load(sys.argv[1])["model"]
    trained = Llama(Shape(len(language.VOCABULARY)))
    trained.load_state_dict(state)
    export(trained, Path(sys.argv[2]))
