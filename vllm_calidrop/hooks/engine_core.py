"""The engine's process sizes our pools once, when the KV pool's size is known, and tells every worker.

`EngineCore._initialize_kv_caches` is wrapped because it is the moment between the two: the workers have their KV cache,
the scheduler (whose ledger needs the number) does not exist yet. It is also the moment to see that nothing is missing:
no request has been served, and every module of the engine's side has been imported.

`calidrop_stats` and `calidrop_change_defaults` are added to it: the API processes call them by name between two steps,
through the engine client's utility calls. The defaults that the operator changes live here, with their version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import require_installed, wrap_method
from vllm_calidrop.selection import is_selected

# Wrapped in this process, or a budget would be without effect.
_REQUIRED = (
    "vllm.v1.core.sched.scheduler.Scheduler.__init__",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule",
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots",
)


def install() -> None:
    when_imported("vllm.v1.engine.core", _wrap)


def _wrap(module: Any) -> None:
    EngineCore = module.EngineCore
    wrap_method(EngineCore, "_initialize_kv_caches", _allocate_swap, ("self", "vllm_config"))
    EngineCore.calidrop_settings = None
    EngineCore.calidrop_reads = 0
    EngineCore.calidrop_stats = _stats
    EngineCore.calidrop_change_defaults = _change_defaults


def _allocate_swap(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_selected(vllm_config):
            return original(self, vllm_config, *args, **kwargs)
        from vllm_calidrop.cache import spec
        from vllm_calidrop.defaults import VersionedSettings
        from vllm_calidrop.engine import size_pools
        from vllm_calidrop.settings import ServerSettings
        from vllm_calidrop.support import refuse_scheduler

        refuse_scheduler(vllm_config.scheduler_config.get_scheduler_cls())
        require_installed(_REQUIRED)
        spec.register()
        self.calidrop_settings = VersionedSettings(
            1, ServerSettings.from_additional_config(vllm_config.additional_config)
        )
        kv_cache_config = original(self, vllm_config, *args, **kwargs)
        kv_cache_config.calidrop_pools = size_pools(vllm_config, kv_cache_config)
        self.model_executor.collective_rpc("calidrop_allocate", args=(kv_cache_config.calidrop_pools,))
        return kv_cache_config

    return _initialize_kv_caches


def _stats(self: Any) -> dict[str, Any]:
    """This engine's numbers (docs/server.md), and the defaults in force. Called between steps: milliseconds."""
    from vllm_calidrop.stats import engine_stats

    self.calidrop_reads += 1
    stats = engine_stats(self.scheduler, self.scheduler.calidrop, getattr(self, "engine_index", 0))
    return {
        "stats": stats | {"read": self.calidrop_reads},
        "defaults": self.calidrop_settings.as_dict(),
    }


def _change_defaults(self: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The defaults with these changes, as version and names; `refused` instead where they cannot be used."""
    from vllm_calidrop.settings import SettingsError

    try:
        self.calidrop_settings = self.calidrop_settings.changed(changes)
    except SettingsError as error:
        return {"refused": {"message": str(error), "field": error.field}}
    return self.calidrop_settings.as_dict()
