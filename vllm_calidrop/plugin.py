"""The entry point `vllm.general_plugins: calidrop`. vLLM calls it in every process, some of them twice."""

from __future__ import annotations


def register() -> None:
    """Register the backend's name and install the wraps. Cheap and idempotent; changes nothing until selected."""
    from vllm_calidrop.hooks import install_api_hooks, install_engine_hooks
    from vllm_calidrop.hooks.registration import backend_member

    backend_member()
    install_engine_hooks()
    install_api_hooks()
