"""What this backend leaves to vLLM's KV pool of the memory that vLLM has found.

On CPU the swap pool takes from the same memory; on a GPU it is the host's.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from vllm_calidrop.evicted.pinned_pool import staging_bytes
from vllm_calidrop.evicted.pool import BLOCKS_AT_ONCE, SwapPool
from vllm_calidrop.memory import (
    ModelShape,
    densest_block,
    encode_bytes,
    footprint,
    num_state_slots,
    prompt_key_bytes,
    recall_pool_bytes,
    recall_pools,
    state_slot_bytes,
    swap_bytes_beside,
)
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.ops.flavour import is_on_gpu
from vllm_calidrop.ops.registry import wanted_set
from vllm_calidrop.settings.server import ServerSettings
from vllm_calidrop.worker.worker import CaliDropWorker

GIB = 2**30


# Bytes per prompt token and KV head while a layer's tokens are ranked: sums, pooled, sorted with their workspace, and
# positions kept and evicted, in float32 and int64.
RANKING_BYTES = 96


def leave_room(vllm_config: Any, worker: Any, available: int) -> int:
    """What of `available` bytes the KV pool may take beside all of ours. On CPU that includes the swap pool.

    A KV pool of fixed size is not shrunk: the sum is checked instead.
    """
    specs = worker.model_runner.get_kv_cache_spec()
    shape = ModelShape.of(vllm_config, next(iter(specs.values())), len(specs))
    settings = ServerSettings.from_additional_config(vllm_config.additional_config)
    num_slots = num_state_slots(vllm_config)
    fixed = fixed_pool(vllm_config, sum(spec.page_size_bytes for spec in specs.values()), available)
    if is_on_gpu():
        return leave_room_on_device(shape, num_slots, settings, vllm_config, available, fixed)
    ours = footprint(shape, num_slots, settings).total
    ours += recall_pool_bytes(recall_pools(max(0, available - ours), None, shape, num_slots, settings), shape, settings)
    free_host = psutil.virtual_memory().available
    if fixed is not None:
        needed = fixed + ours + (settings.swap_bytes or 0)
        if needed > free_host:
            raise ValueError(
                f"calidrop: the fixed KV pool ({fixed / GIB:.2f} GiB), state table, sketches and scratch "
                f"({ours / GIB:.2f} GiB) and swap_bytes ({(settings.swap_bytes or 0) / GIB:.2f} GiB) are more than the "
                f"free memory ({free_host / GIB:.2f} GiB); lower --num-gpu-blocks-override or "
                "--kv-cache-memory-bytes, swap_bytes, or --max-num-seqs"
            )
        return available
    rest = available - ours
    rest -= swap_bytes_beside(max(rest, 0), free_host, settings)
    if rest <= 0:
        raise ValueError(
            f"calidrop: nothing of the available {available / GIB:.2f} GiB is left for the KV pool after state table, "
            f"sketches and scratch ({ours / GIB:.2f} GiB) and the swap pool; lower --max-num-seqs or swap_bytes"
        )
    return rest


def fixed_pool(vllm_config: Any, block_bytes: int, available: int) -> int | None:
    """Bytes of a KV pool whose size the user has fixed, on one rank; None if vLLM fits it to the memory it finds.

    block_bytes: one block of every layer.
    """
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return int(cache.num_gpu_blocks_override * block_bytes)
    return available if cache.kv_cache_memory_bytes is not None else None


def device_bytes(shape: ModelShape, num_slots: int, max_rows: int, max_chunk: int, settings: ServerSettings) -> int:
    """State table, tables, scratch and staging at their fixed addresses; stashes and scratch of prompts in prefill.

    max_chunk: tokens of a batch. Staging is counted as large as it can be: the swap pool is sized later.
    """
    state_table = num_slots * state_slot_bytes(shape)
    fixed = CaliDropWorker.table_bytes(shape.max_model_len, num_slots, max_rows)
    fixed += wanted_set().scratch_bytes(_model_kv(shape), max_rows)
    staging = staging_bytes(2**31, shape.num_kv_heads, shape.head_dim, shape.dtype)
    return state_table + fixed + staging + settings.prefill_state_bytes + compaction_bytes(shape, max_chunk)


def _model_kv(shape: ModelShape) -> ModelKV:
    """The model as the operators know it; scratch does not depend on the block size."""
    group = shape.num_query_heads // shape.num_kv_heads
    return ModelKV(shape.dtype, shape.num_kv_heads, group, shape.head_dim, block_size=16, isa=None)


def compaction_bytes(shape: ModelShape, max_chunk: int) -> int:
    """Scratch of the largest prompt's compaction in one layer: scores of a chunk, ranking, the kept tokens' KV, and of
    encoding: the tokens of some blocks in the cache's dtype, one block's in fp32, and the encoded blocks."""
    from vllm_calidrop.ops.triton import score_scratch_elements

    group = shape.num_query_heads // shape.num_kv_heads
    chunks = [min(max_chunk, 1 << power) for power in range(max_chunk.bit_length() + 1)]
    scores = 4 * max(score_scratch_elements(chunk, shape.num_kv_heads, group) for chunk in chunks)
    per_token = 2 * shape.head_dim * shape.dtype.itemsize + RANKING_BYTES
    block = densest_block(shape) * 2 * shape.head_dim * shape.dtype.itemsize
    blocks = BLOCKS_AT_ONCE * (
        shape.num_kv_heads * block + SwapPool.block_bytes(1, shape.num_kv_heads, shape.head_dim, shape.dtype)
    )
    return (
        scores
        + shape.num_kv_heads * shape.max_model_len * per_token
        + blocks
        + encode_bytes(shape)
        + prompt_key_bytes(shape)
    )


def leave_room_on_device(
    shape: ModelShape,
    num_slots: int,
    settings: ServerSettings,
    vllm_config: Any,
    available: int,
    fixed: int | None = None,
) -> int:
    """What of `available` bytes the KV pool may take. One of fixed size is not shrunk: the sum is checked instead."""
    scheduler = vllm_config.scheduler_config
    ours = device_bytes(shape, num_slots, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, settings)
    if fixed is not None:
        free = torch.cuda.mem_get_info()[0]
        if fixed + ours > free:
            raise ValueError(
                f"calidrop: the fixed KV pool ({fixed / GIB:.2f} GiB), state table and scratch "
                f"({ours / GIB:.2f} GiB) are more than the free device memory ({free / GIB:.2f} GiB); lower "
                "--num-gpu-blocks-override or --kv-cache-memory-bytes, or --max-num-seqs"
            )
        return available
    rest = available - ours
    if rest <= 0:
        raise ValueError(
            f"calidrop: nothing of the available {available / GIB:.2f} GiB is left for the KV pool after state table "
            f"and scratch ({ours / GIB:.2f} GiB); lower --max-num-seqs or --max-model-len"
        )
    return rest
