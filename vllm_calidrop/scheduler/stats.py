"""One engine's state as plain data (docs/server.md): read by the API processes through a utility call of EngineCore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS

if TYPE_CHECKING:
    from vllm_calidrop.scheduler.ledger import Ledger


def engine_stats(scheduler: Any, ledger: Ledger, engine: int) -> dict[str, Any]:
    """An entry of `engines` in GET /calidrop/stats. Only numbers, names and vLLM's request ids."""
    shape, ids = ledger.shape, ledger.ids
    pool = scheduler.kv_cache_manager.block_pool
    usable = pool.num_gpu_blocks - 1  # the null block is never given out
    living = ledger.reports.all()
    token_bytes = shape.kv_bytes_per_token * shape.num_kv_heads * shape.num_layers * shape.ranks
    return {
        "engine": engine,
        "sequences": ledger.sequences(),
        "waiting": scheduler.get_request_counts()[1],
        "swap": {
            "used_blocks": ids.swap.num_used,
            "total_blocks": ids.swap.size,
            "block_bytes": SWAP_BLOCK_TOKENS * token_bytes,
        },
        "sketch": {"used_blocks": ids.sketches.num_used, "total_blocks": ids.sketches.size},
        "buffer": {"used_pages": ids.buffers.num_used, "total_pages": ids.buffers.size},
        "kv_blocks": {
            "used": usable - pool.get_num_free_blocks(),
            "total": usable,
            "freed_total": ledger.totals.kv_blocks_freed,
        },
        "compacted_sequences": ids.slots.num_used,
        "layers": ledger.totals.layers_with(living),
        "totals": ledger.totals.as_dict(living),
        "histograms": ledger.totals.histograms(),
    }
