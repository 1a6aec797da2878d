"""The KV-cache spec that makes vLLM use our block manager for full-attention layers of this backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_calidrop.support import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class CaliDropSpec(FullAttentionSpec):
    """Full attention whose prompt may be compacted. Same pages; no fields of its own (merge would drop them)."""


def customize_spec(spec: AttentionSpec) -> AttentionSpec:
    """Ours for plain full attention; anything else passes and is refused at start-up."""
    return replace_as(spec, CaliDropSpec) if type(spec) is FullAttentionSpec else spec


def refuse_groups(kv_cache_config: Any) -> None:
    """Raise UnsupportedError unless all of the KV cache is one group of plain full attention."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = sorted({type(spec).__name__ for spec in specs if not isinstance(spec, CaliDropSpec)})
    if kinds:
        raise UnsupportedError([f"KV-cache groups of {', '.join(kinds)} (hybrid models)"])
    if len(specs) != 1:
        raise UnsupportedError([f"{len(specs)} KV-cache groups (layers of different shapes)"])


def register() -> None:
    """Pair the spec with its manager. vLLM's own specs go first: the registry fills itself only while it is empty."""
    from vllm_calidrop.scheduler.block_manager import CaliDropManager

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CaliDropSpec, CaliDropManager, uniform_type_base_spec=CaliDropSpec)
