"""The scheduler's half of an engine, from vLLM's configuration: the sizes of the pools, and the ledger over them."""

from __future__ import annotations

import logging
from typing import Any

import psutil

from vllm_calidrop.memory import (
    ModelShape,
    PoolSizes,
    buffer_page_bytes,
    default_swap_bytes,
    footprint,
    num_state_slots,
    recall_pools,
    sketch_block_bytes,
    swap_block_bytes,
)
from vllm_calidrop.ops.flavour import uses_cuda_flavour
from vllm_calidrop.scheduler.ledger import Ledger
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.scheduler.spec import refuse_groups
from vllm_calidrop.settings.server import ServerSettings

logger = logging.getLogger("vllm.calidrop")

GIB = 2**30


def make_ledger(vllm_config: Any, kv_cache_config: Any) -> Ledger:
    """The scheduler's ledger. The swap pool was sized, and the workers told, before the scheduler is built."""
    (group,) = kv_cache_config.kv_cache_groups
    shape = ModelShape.of_groups(vllm_config, kv_cache_config)
    return Ledger(
        Shape(
            block_size=group.kv_cache_spec.block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            num_query_heads=shape.num_query_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
        ),
        pools=kv_cache_config.calidrop_pools,
        num_slots=num_state_slots(vllm_config),
        prefill_state_limit=ServerSettings.from_additional_config(vllm_config.additional_config).prefill_state_bytes,
    )


def size_pools(vllm_config: Any, kv_cache_config: Any) -> PoolSizes:
    """The pools of this engine, per rank; refuses what cannot fit. Logged, because it is a promise of memory."""
    refuse_groups(kv_cache_config)
    shape = ModelShape.of_groups(vllm_config, kv_cache_config)
    settings = ServerSettings.from_additional_config(vllm_config.additional_config)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * max(1, getattr(parallel, "data_parallel_size_local", 1))
    free_host = psutil.virtual_memory().available // ranks
    (group,) = kv_cache_config.kv_cache_groups
    kv_pool = kv_cache_config.num_blocks * group.kv_cache_spec.page_size_bytes * shape.num_layers
    swap = settings.swap_bytes
    if swap is None:
        swap = default_swap_bytes(kv_pool, free_host)
    if swap > free_host:
        raise ValueError(
            f"calidrop: swap_bytes ({swap / GIB:.2f} GiB per rank) is more than the free host memory "
            f"({free_host / GIB:.2f} GiB per rank); set it with "
            '--additional-config \'{"calidrop": {"swap_bytes": ...}}\''
        )
    blocks = int(swap // swap_block_bytes(shape))
    sketch_blocks, buffer_pages = recall_pools(kv_pool, blocks, shape, num_state_slots(vllm_config), settings)
    if uses_cuda_flavour():  # recall by pages is refused there (support.py)
        sketch_blocks = buffer_pages = 0
    ours = footprint(shape, num_state_slots(vllm_config), settings)
    logger.info(
        "CaliDrop: swap pool %.2f GiB (%d blocks) per rank, KV pool %.2f GiB, state table %.1f MiB, "
        "prefill state up to %.1f MiB, scratch up to %.1f MiB; recall by pages: sketches %.1f MiB (%d blocks), "
        "page buffers %.1f MiB (%d pages), means %.1f MiB",
        blocks * swap_block_bytes(shape) / GIB,
        blocks,
        kv_pool / GIB,
        ours.state_table / 2**20,
        ours.prefill_state / 2**20,
        ours.scratch / 2**20,
        sketch_blocks * sketch_block_bytes(shape, settings) / 2**20,
        sketch_blocks,
        buffer_pages * buffer_page_bytes(shape) / 2**20,
        buffer_pages,
        ours.recall / 2**20,
    )
    return PoolSizes(blocks, sketch_blocks, buffer_pages, settings.sketch_rest)
