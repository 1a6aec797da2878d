"""Turns a GGUF file into a model folder that vLLM and Transformers read: weights made dense, in bfloat16.

The weights keep the values that quantisation left them, so every figure of such a model must say so.
"""

from __future__ import annotations

from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of `gguf` into `folder`, which must not exist."""
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError as error:
        from benchmarks.models.fetch import ModelError

        raise ModelError(f"converting a model needs the package {error.name}: `make install-dev` installs it") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
