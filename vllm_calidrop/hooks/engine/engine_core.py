"""The engine's process sizes our pools once, when the KV pool's size is known, and tells every worker.

`Executor.initialize_from_config` is wrapped because it is the moment between the two: after it the workers have their
KV cache, and neither CUDA graphs (which record the addresses of our tensors) nor the scheduler (whose ledger needs the
number) exist yet. `EngineCore._initialize_kv_caches` is wrapped around it, to see first that nothing is missing: no
request has been served, and every module of the engine's side has been imported.

`calidrop_stats` and `calidrop_change_defaults` are added to it: the API processes call them by name between two steps,
through the engine client's utility calls. The defaults that the operator changes live here, with their version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.engine.scheduler import require_our_scheduler
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import require_installed, require_instantiable, require_wraps_in_use, wrap_method
from vllm_calidrop.selection import is_selected

# Wrapped in this process, or a budget would be without effect.
_REQUIRED = ("vllm.v1.executor.abstract.Executor.initialize_from_config",)


def install() -> None:
    when_imported("vllm.v1.engine.core", _wrap_engine)
    when_imported("vllm.v1.executor.abstract", _wrap_executor)


def _wrap_engine(module: Any) -> None:
    EngineCore = module.EngineCore
    wrap_method(EngineCore, "_initialize_kv_caches", _check_first, ("self", "vllm_config"))
    EngineCore.calidrop_settings = None
    EngineCore.calidrop_reads = 0
    EngineCore.calidrop_stats = _stats
    EngineCore.calidrop_change_defaults = _change_defaults


def _wrap_executor(module: Any) -> None:
    wrap_method(module.Executor, "initialize_from_config", _allocate_pools, ("self", "kv_cache_configs"))


def _check_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_selected(vllm_config):
            return original(self, vllm_config, *args, **kwargs)
        from vllm_calidrop.scheduler import block_manager, spec
        from vllm_calidrop.settings.defaults import VersionedSettings
        from vllm_calidrop.settings.server import ServerSettings

        require_our_scheduler(vllm_config)
        require_installed(_REQUIRED, __name__)
        for cls in (type(self), type(self.model_executor)):
            require_wraps_in_use(cls)
        for ours in (spec.CaliDropSpec, block_manager.CaliDropManager):
            require_instantiable(ours)
        spec.register()
        self.calidrop_settings = VersionedSettings(
            1, ServerSettings.from_additional_config(vllm_config.additional_config)
        )
        kv_cache_config = original(self, vllm_config, *args, **kwargs)
        kv_cache_config.calidrop_pools = self.model_executor.calidrop_pools
        return kv_cache_config

    return _initialize_kv_caches


def _allocate_pools(original: Callable[..., None]) -> Callable[..., None]:
    def initialize_from_config(self: Any, kv_cache_configs: Any, *args: Any, **kwargs: Any) -> None:
        original(self, kv_cache_configs, *args, **kwargs)
        if is_selected(self.vllm_config):
            from vllm_calidrop.scheduler.build import size_pools

            self.calidrop_pools = size_pools(self.vllm_config, kv_cache_configs[0])
            self.collective_rpc("calidrop_allocate", args=(self.calidrop_pools,))

    return initialize_from_config


def _stats(self: Any) -> dict[str, Any]:
    """This engine's numbers (docs/server.md), the defaults in force and the tokens of a KV-cache block.

    It is called between two steps and takes milliseconds.
    """
    from vllm_calidrop.scheduler.stats import engine_stats

    self.calidrop_reads += 1
    stats = engine_stats(self.scheduler, self.scheduler.calidrop, getattr(self, "engine_index", 0))
    return {
        "stats": stats | {"read": self.calidrop_reads},
        "defaults": self.calidrop_settings.as_dict(),
        "block_size": self.scheduler.calidrop.shape.block_size,
    }


def _change_defaults(self: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The defaults with these changes, as version and names; `refused` instead where they cannot be used."""
    from vllm_calidrop.settings.request import SettingsError
    from vllm_calidrop.settings.server import resolve_request
    from vllm_calidrop.support import refuse_settings

    try:
        changed = self.calidrop_settings.changed(changes)
        refuse_settings(resolve_request({}, changed.settings))
    except SettingsError as error:
        return {"refused": {"message": str(error), "field": error.field}}
    self.calidrop_settings = changed
    return changed.as_dict()
