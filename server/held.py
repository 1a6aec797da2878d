"""What one answered request held, against full KV: the figures under an answer on the page.

The sizes come from the functions of `calidrop-server plan`, which are the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_calidrop.memory import ModelShape, buffer_page_bytes, sketch_block_bytes, swap_block_bytes
from vllm_calidrop.settings.request import SettingsError
from vllm_calidrop.settings.server import ServerSettings, resolve_request

from .plan import PerSequence, Workload, fit_budget, fit_full, kv_block_bytes

_NUMBERS = ("prompt_tokens", "answer_tokens")
_MODES = ("calidrop", "evict", "full")


def model_shape(vllm_config: Any) -> ModelShape:
    """One tensor-parallel rank's share of the model that an engine with this VllmConfig serves."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return ModelShape(
        num_layers=model.get_num_layers(parallel),
        num_query_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        dtype=model.dtype,
        max_model_len=model.max_model_len,
    )


def held_by(
    asked: Mapping[str, Any],
    shape: ModelShape,
    block_size: int,
    server: ServerSettings,
    engine: Mapping[str, Any],
    ranks: int,
) -> dict[str, Any]:
    """Tokens, blocks and bytes that a request holds at its last token, and how many such the engine's pools hold.

    asked: `prompt_tokens`, `answer_tokens`, the `mode` of its report, and the `kv_*` fields it was sent with.
    engine: one entry of `/calidrop/stats`. Bytes are those of all `ranks`. SettingsError names a field that is wrong.
    """
    prompt, answer = (_count(asked, name) for name in _NUMBERS)
    mode = asked.get("mode", "calidrop")
    if mode not in _MODES:
        raise SettingsError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}", "mode", value=mode)
    fields = {name: value for name, value in asked.items() if name not in (*_NUMBERS, "mode")}
    settings = resolve_request(fields, server)
    if mode == "full":
        settings = settings.model_copy(update={"kv_budget": None})
    elif mode == "evict":
        settings = settings.model_copy(update={"kv_calibration": False})
    one = PerSequence.of(Workload(prompt, answer, 1, block_size, settings), shape)
    block = kv_block_bytes(shape, block_size) * ranks
    kept = min(prompt, settings.kv_budget) if settings.compresses and settings.kv_budget else prompt
    pool = engine["kv_blocks"]["total"] + 1  # with the null block, as vLLM counts its pool
    fit = fit_budget(one, pool)
    for needed, total in (
        (one.swap_blocks, engine["swap"]["total_blocks"]),
        (one.sketch_blocks, engine["sketch"]["total_blocks"]),
        (one.buffer_pages, engine["buffer"]["total_pages"]),
    ):
        fit = min(fit, total // needed) if needed else fit
    recall = one.sketch_blocks * sketch_block_bytes(shape, server) + one.buffer_pages * buffer_page_bytes(shape)
    return {
        "full": {
            "tokens": prompt + answer,
            "blocks": one.full_blocks,
            "bytes": one.full_blocks * block,
            "fit": fit_full(one, pool),
        },
        "held": {
            "tokens": kept + answer,
            "blocks": one.budget_blocks,
            "bytes": one.budget_blocks * block,
            "fit": fit,
        },
        "recall_bytes": recall * ranks,
        "host_bytes": one.swap_blocks * swap_block_bytes(shape) * ranks,
    }


def _count(asked: Mapping[str, Any], name: str) -> int:
    value = asked.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise SettingsError(f"{name} must be a number of tokens, got {value!r}", name, value=value)
    return value
