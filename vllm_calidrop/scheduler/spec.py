"""The KV-cache spec that makes vLLM use our block manager for full-attention layers of this backend."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class CaliDropSpec(FullAttentionSpec):
    """Full attention whose prompt may be compacted. Same pages; no fields of its own (merge would drop them)."""


def customize_spec(spec: AttentionSpec) -> AttentionSpec:
    """Ours for plain full attention; anything else passes and is refused at start-up."""
    return replace_as(spec, CaliDropSpec) if type(spec) is FullAttentionSpec else spec


def register() -> None:
    """Pair the spec with its manager. vLLM's own specs go first: the registry fills itself only while it is empty."""
    from vllm_calidrop.scheduler.block_manager import CaliDropManager

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CaliDropSpec, CaliDropManager, uniform_type_base_spec=CaliDropSpec)
