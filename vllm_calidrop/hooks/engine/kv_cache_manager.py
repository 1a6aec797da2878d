"""Admission happens inside vLLM's KV-cache manager, which asks nobody; two of its methods are wrapped.

`get_computed_blocks`: a prefix-cache hit is cut so that compaction never writes a shared block and the policy sees the
queries it needs. `allocate_slots`: a request that holds no decision yet is being admitted; it is decided there, before
its blocks are taken, and waits while its uncompressed prompt would make a running sequence be preempted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method


def install() -> None:
    when_imported("vllm.v1.core.kv_cache_manager", _wrap)


def _wrap(module: Any) -> None:
    KVCacheManager = module.KVCacheManager
    wrap_method(KVCacheManager, "get_computed_blocks", _cut_hits, ("self", "request"))
    wrap_method(
        KVCacheManager,
        "allocate_slots",
        _decide_admission,
        ("self", "request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks"),
    )


def _cut_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, request, *args, **kwargs)
        ledger = getattr(self, "calidrop", None)
        if ledger is None:
            return found
        blocks, hit_tokens, *rest = found
        allowed = ledger.allowed_hit(request, hit_tokens)
        if allowed == hit_tokens:
            return found
        return (self.truncate_computed_blocks(blocks, allowed), allowed, *rest)

    return get_computed_blocks


def _decide_admission(original: Callable[..., Any]) -> Callable[..., Any]:
    def allocate_slots(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def allocate() -> Any:
            return original(
                self, request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, *args, **kwargs
            )

        ledger = getattr(self, "calidrop", None)
        if ledger is None or ledger.is_admitted(request):
            return allocate()
        if ledger.must_wait(request, _blocks(self, new_computed_blocks)):
            return None
        if not ledger.admit(request):
            return None
        blocks = allocate()
        if blocks is None:
            ledger.cancel(request)
        else:
            ledger.confirm(request)
        return blocks

    return allocate_slots


def _blocks(manager: Any, hit_blocks: Any) -> Any:
    from vllm_calidrop.scheduler.headroom import KVBlocks

    (group,) = manager.coordinator.single_type_managers
    pool = manager.block_pool
    # Blocks of the hit that somebody else holds cost nothing; the others are counted as free blocks are.
    shared = sum(block.ref_cnt > 0 for block in hit_blocks.blocks[0]) if hit_blocks and hit_blocks.blocks[0] else 0
    return KVBlocks(
        total=pool.num_gpu_blocks - 1,
        free=pool.get_num_free_blocks(),
        held={request_id: len(blocks) for request_id, blocks in group.req_to_blocks.items()},
        shared=shared,
        chunk=manager.calidrop_chunk,
    )
