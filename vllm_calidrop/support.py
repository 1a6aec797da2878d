"""What is refused, with a clear error at start-up, until it is really supported and tested (docs: README, Limits)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_calidrop.selection import BACKEND_NAME

if TYPE_CHECKING:
    from vllm_calidrop.settings.request import RequestSettings

logger = logging.getLogger("vllm.calidrop")

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16")


class UnsupportedError(ValueError):
    """The engine's configuration and this backend do not go together."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(f"--attention-backend {BACKEND_NAME.lower()} does not support: {'; '.join(reasons)}")
        self.reasons = reasons


def refuse_config(vllm_config: Any) -> None:
    """Raise UnsupportedError for what can be seen in a VllmConfig."""
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    reasons = []
    if vllm_config.speculative_config is not None:
        reasons.append("speculative decoding (--speculative-config)")
    if vllm_config.kv_transfer_config is not None:
        reasons.append("KV connectors (--kv-transfer-config)")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reasons.append("context parallelism")
    if parallel.pipeline_parallel_size > 1:
        reasons.append("pipeline parallelism")
    if parallel.use_ubatching:
        reasons.append("microbatches (--enable-dbo, --ubatch-size)")
    if cache.cache_dtype not in KV_CACHE_DTYPES:
        reasons.append(f"a quantised KV cache (--kv-cache-dtype {cache.cache_dtype})")
    if model is not None:
        if model.use_mla:
            reasons.append("multi-head latent attention (MLA)")
        if model.runner_type != "generate":
            reasons.append(f"models that do not generate (runner {model.runner_type})")
        if model.is_encoder_decoder:
            reasons.append("encoder-decoder models")
        if model.get_sliding_window() is not None:
            reasons.append("sliding-window attention (try --disable-sliding-window)")
    if reasons:
        raise UnsupportedError(reasons)


def refuse_platform() -> None:
    """Raise UnsupportedError where there are no kernels of ours; a warning on CUDA as long as no GPU has run them."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise UnsupportedError([f"the platform {current_platform.device_name} (it runs on CPU and CUDA)"])
    logger.warning(
        "CaliDrop: the CUDA backend has been tested without a GPU only; its kernels are checked on this one before "
        "anything is served, speed and CUDA graphs are untried (docs/gpu.md)"
    )


def refuse_settings(settings: RequestSettings) -> None:
    """Raise SettingsError, naming the field, for a request whose settings this process's operators do not serve."""
    from vllm_calidrop.evicted.codecs import has_kernel_layout
    from vllm_calidrop.ops.registry import wanted_set
    from vllm_calidrop.settings.request import SettingsError

    if not settings.calibrates:
        return
    operators = wanted_set()
    for name, values in operators.VALUES.items():
        value = getattr(settings, name)
        if value not in values:
            raise SettingsError(
                f"{name} ({value}) is not supported by the {operators.name} operators", name, value=value
            )
    if not operators.decodes_first and not has_kernel_layout(settings.kv_codec):
        raise SettingsError(
            f"kv_codec ({settings.kv_codec}) has no layout that the {operators.name} operators could read",
            "kv_codec",
            value=settings.kv_codec,
        )


def refuse_scheduler(scheduler: type) -> None:
    """Raise UnsupportedError unless it is vLLM's scheduler or derived from it: the ledger lives in its methods."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if not issubclass(scheduler, Scheduler):
        raise UnsupportedError([f"the scheduler {scheduler.__qualname__} (--scheduler-cls)"])


def refuse_layer(impl: Any) -> None:
    """Raise UnsupportedError for what only an attention layer knows."""
    reasons = []
    if impl.sliding_window not in (-1, (-1, -1)):
        reasons.append("sliding-window attention layers")
    if impl.sinks is not None:
        reasons.append("attention-sink layers")
    if impl.alibi_slopes is not None:
        reasons.append("ALiBi")
    if impl.logits_soft_cap:
        reasons.append("soft-capped attention logits")
    if impl.kv_sharing_target_layer_name is not None:
        reasons.append("KV sharing between layers")
    if impl.kv_cache_dtype not in KV_CACHE_DTYPES:
        reasons.append("a quantised KV cache")
    if impl.attn_type != "decoder":
        reasons.append(f"{impl.attn_type} attention")
    if reasons:
        raise UnsupportedError(reasons)
