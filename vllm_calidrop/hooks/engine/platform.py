"""CpuPlatform knows one attention backend and takes it whatever was asked for; and nobody checks what we refuse.

`get_attn_backend_cls` is wrapped so that CALIDROP resolves to our class on CPU; other platforms validate it themselves.
`check_and_update_config` is wrapped because it is the one place that sees every finished VllmConfig, in the process the
user started, before any memory or process is spent; on CUDA as on CPU. Our scheduler and worker are put into it there.
The CPU hook does not wait for an import: the other hooks' modules are looked for here, so that one that vLLM has
renamed is an error and not a hook that never comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.compat import check_vllm_version
from vllm_calidrop.hooks.engine.scheduler import use_our_scheduler
from vllm_calidrop.hooks.engine.worker import use_our_worker
from vllm_calidrop.hooks.on_import import require_awaited_modules, when_imported
from vllm_calidrop.hooks.registration import BACKEND_PATH
from vllm_calidrop.hooks.wrap import hook_error, wrap_method
from vllm_calidrop.selection import BACKEND_NAME, is_selected


def install() -> None:
    try:
        from vllm.platforms.cpu import CpuPlatform
    except ImportError as error:
        raise hook_error(str(error), __name__) from error

    wrap_method(
        CpuPlatform,
        "get_attn_backend_cls",
        _resolve_ours,
        ("cls", "selected_backend", "attn_selector_config"),
    )
    wrap_method(CpuPlatform, "check_and_update_config", _check, ("cls", "vllm_config"))
    when_imported("vllm.platforms.cuda", _wrap_cuda)


def _wrap_cuda(module: Any) -> None:
    wrap_method(module.CudaPlatformBase, "check_and_update_config", _check, ("cls", "vllm_config"))


def _resolve_ours(original: Callable[..., str]) -> Callable[..., str]:
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if getattr(selected_backend, "name", None) == BACKEND_NAME and not attn_selector_config.use_mla:
            return BACKEND_PATH
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    return get_attn_backend_cls


def _check(original: Callable[..., None]) -> Callable[..., None]:
    def check_and_update_config(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(cls, vllm_config, *args, **kwargs)
        if is_selected(vllm_config):
            from vllm_calidrop.settings.server import ServerSettings, resolve_request
            from vllm_calidrop.support import refuse_config, refuse_platform, refuse_settings

            check_vllm_version()
            require_awaited_modules()
            refuse_platform()
            refuse_config(vllm_config)
            server = ServerSettings.from_additional_config(vllm_config.additional_config)
            refuse_settings(resolve_request({}, server))
            use_our_scheduler(vllm_config)
            use_our_worker(vllm_config)

    return check_and_update_config
