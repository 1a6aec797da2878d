"""Shapes of models that people serve: with theta1 = theta2 = 2 each gives the stock backend's answers, in float32.

Every model has random weights and one or two layers. Together they have each head size, group size and kind of
attention layer at least once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.harness import Engine

pytestmark = pytest.mark.engine

EXACT = {"kv_budget": 64, "kv_theta1": 2}
PROMPTS = [[(7 * i * i + 3 * i + seed) % 190 + 5 for i in range(length)] for seed, length in enumerate((300, 157, 211))]
SIZES: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 1152}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def shape(head_dim: int, heads: int, kv_heads: int, layers: int = 2) -> dict[str, Any]:
    return SIZES | {
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }


MODELS: dict[str, Any] = {
    "head 32, one KV head, one layer": lambda: transformers.LlamaConfig(**shape(32, 4, 1, layers=1)),
    "head 80, groups of 3, rope scaling": lambda: transformers.LlamaConfig(
        **shape(80, 6, 2), rope_parameters=LLAMA3_ROPE
    ),
    # Qwen2 derives its head size from the hidden size.
    "head 96, groups of 7, QKV bias": lambda: transformers.Qwen2Config(**shape(96, 7, 1) | {"hidden_size": 672}),
    "head 112, no groups": lambda: transformers.LlamaConfig(**shape(112, 2, 2)),
    "head 192, qk-norm": lambda: transformers.Qwen3Config(**shape(192, 4, 2)),
    "head 256, groups of 4, qk-norm, one layer": lambda: transformers.Qwen3Config(**shape(256, 4, 1, layers=1)),
}


def answers(path: Path, backend: str | None, settings: dict[str, Any] | None) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities, of all prompts in one batch."""
    from vllm import SamplingParams

    engine = Engine(str(path), backend, skip_tokenizer_init=True, num_gpu_blocks_override=128, max_num_seqs=4)
    try:
        params = SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, detokenize=False, extra_args=settings
        )
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [output.outputs[0] for output in engine.llm.generate(prompts, params, use_tqdm=False)]
        if settings:
            assert [report["kept"] for report in (output.calidrop for output in outputs)] == [64] * len(PROMPTS)
        return [
            (list(output.token_ids), [step[token].logprob for step, token in zip(output.logprobs, output.token_ids)])
            for output in outputs
        ]
    finally:
        engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_stock_backend(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MODELS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() < 2 else parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path)
    stock = answers(tmp_path, None, None)
    ours = answers(tmp_path, "CALIDROP", EXACT)
    evicted = answers(tmp_path, "CALIDROP", EXACT | {"kv_calibration": False})
    for (tokens, logprobs), (expected_tokens, expected) in zip(ours, stock, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected, abs=2e-4)
    assert [logprobs for _, logprobs in evicted] != [pytest.approx(expected, abs=2e-4) for _, expected in stock]
