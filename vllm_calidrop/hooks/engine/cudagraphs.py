"""A batch of single tokens may hold the last token of a prompt, and vLLM replays such a batch as decodes.

A captured CUDA graph runs no Python, so it could not compact. Both runners choose a graph in one place each, and both
places are wrapped (`CudaGraphManager.dispatch` of V2, `CudagraphDispatcher.dispatch` of V1): while a prompt that is to
be compacted is not complete, the batch is not a uniform decode, which leaves it piecewise graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method


def install() -> None:
    when_imported("vllm.v1.worker.gpu.cudagraph_utils", _wrap_v2)
    when_imported("vllm.v1.cudagraph_dispatcher", _wrap_v1)


def _wrap_v2(module: Any) -> None:
    expected = ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras", "max_query_len")
    wrap_method(module.CudaGraphManager, "dispatch", _as_mixed_v2, expected)


def _wrap_v1(module: Any) -> None:
    wrap_method(module.CudagraphDispatcher, "dispatch", _as_mixed_v1, ("self", "num_tokens", "uniform_decode"))


def _as_mixed_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(
        self: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _must_compact():
            uniform_token_count = max_query_len = None
        return original(
            self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, *args, **kwargs
        )

    return dispatch


def _as_mixed_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(self: Any, num_tokens: int, uniform_decode: bool = False, *args: Any, **kwargs: Any) -> Any:
        return original(self, num_tokens, uniform_decode and not _must_compact(), *args, **kwargs)

    return dispatch


def _must_compact() -> bool:
    from vllm_calidrop.worker.worker import active_worker

    worker = active_worker()
    return worker is not None and worker.has_unfinished_prompt()
