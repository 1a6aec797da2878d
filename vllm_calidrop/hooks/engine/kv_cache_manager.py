"""vLLM's KV-cache manager with two methods of ours in front of its own: admission happens there, and it asks nobody.

`get_computed_blocks`: a prefix-cache hit is cut so that compaction never writes a shared block and the policy sees the
queries it needs. `allocate_slots`: a request that holds no decision yet is being admitted; it is decided there, before
its blocks are taken, and waits while its uncompressed prompt would make a running sequence be preempted.

The manager that a scheduler has made is turned into an object of the mixed class (hooks/engine/scheduler.py), because
no setting names its class.
"""

from __future__ import annotations

from typing import Any

from vllm_calidrop.hooks.mixed import Below, Mixture


class DecidingManager(Below):
    """Mixed into vLLM's KVCacheManager. calidrop: the ledger. calidrop_chunk: most tokens of a prompt in one step."""

    def get_computed_blocks(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().get_computed_blocks(request, *args, **kwargs)
        blocks, hit_tokens, *rest = found
        allowed = self.calidrop.allowed_hit(request, hit_tokens)
        if allowed == hit_tokens:
            return found
        return (self.truncate_computed_blocks(blocks, allowed), allowed, *rest)

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        allocate = super().allocate_slots
        arguments = (request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, *args)
        ledger = self.calidrop
        if ledger.is_admitted(request):
            return allocate(*arguments, **kwargs)
        if ledger.must_wait(request, _blocks(self, new_computed_blocks)):
            return None
        if not ledger.admit(request):
            return None
        blocks = allocate(*arguments, **kwargs)
        if blocks is None:
            ledger.cancel(request)
        else:
            ledger.confirm(request)
        return blocks


MIXTURE = Mixture(
    __name__,
    DecidingManager,
    ("vllm.v1.core.kv_cache_manager.KVCacheManager",),
    {
        "get_computed_blocks": ("self", "request"),
        "allocate_slots": (
            "self",
            "request",
            "num_new_tokens",
            "num_new_computed_tokens",
            "new_computed_blocks",
        ),
    },
)


def deciding(manager: type) -> type:
    """The class of this manager with our methods in front."""
    return MIXTURE.of(manager)


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
