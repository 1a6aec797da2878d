"""Every place where vLLM is wrapped: one file per wrapped thing, each with its reason."""

from __future__ import annotations


def install_engine_hooks() -> None:
    """The engine's and the workers' side. Each waits for its module's import, but for the platform's.

    Scheduler and worker are not wrapped: the platform's hook puts classes of ours into the configuration.
    """
    from vllm_calidrop.hooks.engine import cudagraphs, engine_core, platform, shutdown

    for hook in (platform, engine_core, cudagraphs, shutdown):
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
