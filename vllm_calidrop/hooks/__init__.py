"""Every place where vLLM is wrapped: one file per wrapped thing, each with its reason."""

from __future__ import annotations


def install_engine_hooks() -> None:
    """The engine's and the workers' side: decisions, records, counters, memory. Each waits for its module's import."""
    from vllm_calidrop.hooks.engine import (
        cudagraphs,
        engine_core,
        kv_cache_manager,
        memory,
        platform,
        scheduler,
        shutdown,
        worker,
    )

    for hook in (platform, engine_core, scheduler, kv_cache_manager, worker, memory, cudagraphs, shutdown):
        hook.install()


def install_api_hooks() -> None:
    """The API process's side: settings of requests, and reports in responses. Each waits for its module's import."""
    from vllm_calidrop.hooks.api import (
        beam_search,
        input_processor,
        openai_reports,
        openai_requests,
        output_processor,
        tracing,
        verdict,
    )

    for hook in (input_processor, output_processor, openai_requests, openai_reports, beam_search, tracing, verdict):
        hook.install()
