"""Puts the parts together from vLLM's configuration: called by the hooks, imports everything below them."""

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
    recall_pool_bytes,
    recall_pools,
    sketch_block_bytes,
    swap_block_bytes,
    swap_bytes_beside,
)
from vllm_calidrop.ops.flavour import is_on_gpu, uses_cuda_flavour
from vllm_calidrop.scheduler.ledger import Ledger
from vllm_calidrop.scheduler.reports import Shape
from vllm_calidrop.scheduler.spec import CaliDropSpec
from vllm_calidrop.settings.server import ServerSettings
from vllm_calidrop.support import refuse_groups
from vllm_calidrop.worker.worker import CaliDropWorker

logger = logging.getLogger("vllm.calidrop")

GIB = 2**30


def make_ledger(vllm_config: Any, kv_cache_config: Any) -> Ledger:
    """The scheduler's ledger. The swap pool was sized, and the workers told, before the scheduler is built."""
    spec = _spec(kv_cache_config)
    shape = _model_shape(vllm_config, kv_cache_config)
    return Ledger(
        Shape(
            block_size=spec.block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            num_query_heads=shape.num_query_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
        ),
        pools=kv_cache_config.calidrop_pools,
        num_slots=_num_slots(vllm_config),
        prefill_state_limit=_settings(vllm_config).prefill_state_bytes,
    )


def make_worker(worker: Any, pools: PoolSizes) -> CaliDropWorker:
    """One rank's state table, pools and sequences, on the layers vLLM bound to its KV cache."""
    runner, config = worker.model_runner, worker.vllm_config
    (group,) = runner.kv_cache_config.kv_cache_groups
    layer_names = list(group.layer_names)
    shape, num_slots = _model_shape(config, runner.kv_cache_config), _num_slots(config)
    if not uses_cuda_flavour():
        return CaliDropWorker(runner, layer_names, shape, num_slots, pools)
    from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
    from vllm_calidrop.worker.self_check import self_check

    max_rows = config.scheduler_config.max_num_seqs
    ours = CaliDropCudaWorker(runner, layer_names, shape, num_slots, pools, runner.device, max_rows)
    for name, index in ours.layer_index.items():
        layer = config.compilation_config.static_forward_context[name]
        layer.impl.attach(ours, index, layer.kv_cache)
    self_check(ours, layer.kv_cache, layer.impl.scale)
    return ours


def size_pools(vllm_config: Any, kv_cache_config: Any) -> PoolSizes:
    """The pools of this engine, per rank; refuses what cannot fit. Logged, because it is a promise of memory."""
    refuse_groups(kv_cache_config)
    spec, shape, settings = (
        _spec(kv_cache_config),
        _model_shape(vllm_config, kv_cache_config),
        _settings(vllm_config),
    )
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * max(1, getattr(parallel, "data_parallel_size_local", 1))
    free_host = psutil.virtual_memory().available // ranks
    kv_pool = kv_cache_config.num_blocks * spec.page_size_bytes * shape.num_layers
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
    sketch_blocks, buffer_pages = recall_pools(kv_pool, blocks, shape, _num_slots(vllm_config), settings)
    if uses_cuda_flavour():  # recall by pages is refused there (support.py)
        sketch_blocks = buffer_pages = 0
    ours = footprint(shape, _num_slots(vllm_config), settings)
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
        sketch_blocks * sketch_block_bytes(shape) / 2**20,
        sketch_blocks,
        buffer_pages * buffer_page_bytes(shape) / 2**20,
        buffer_pages,
        ours.recall / 2**20,
    )
    return PoolSizes(blocks, sketch_blocks, buffer_pages)


def leave_room(vllm_config: Any, worker: Any, available: int) -> int:
    """What of `available` bytes the KV pool may take beside all of ours. On CPU that includes the swap pool.

    A KV pool of fixed size is not shrunk: the sum is checked instead.
    """
    if is_on_gpu():
        from vllm_calidrop.worker.room import leave_room_on_device

        return leave_room_on_device(
            _shape_of_runner(worker), _num_slots(vllm_config), _settings(vllm_config), vllm_config, available
        )
    shape, settings, num_slots = _shape_of_runner(worker), _settings(vllm_config), _num_slots(vllm_config)
    ours = footprint(shape, num_slots, settings).total
    ours += recall_pool_bytes(recall_pools(max(0, available - ours), None, shape, num_slots, settings), shape)
    free_host = psutil.virtual_memory().available
    if vllm_config.cache_config.kv_cache_memory_bytes is not None:
        needed = available + ours + (settings.swap_bytes or 0)
        if needed > free_host:
            raise ValueError(
                f"calidrop: the fixed KV pool ({available / GIB:.2f} GiB), state table, sketches and scratch "
                f"({ours / GIB:.2f} GiB) and swap_bytes ({(settings.swap_bytes or 0) / GIB:.2f} GiB) are more than the "
                f"free memory ({free_host / GIB:.2f} GiB)"
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


def _settings(vllm_config: Any) -> ServerSettings:
    return ServerSettings.from_additional_config(vllm_config.additional_config)


def _num_slots(vllm_config: Any) -> int:
    # A slot waits until no step in flight can touch it, so every concurrent batch may hold a full set.
    return int(vllm_config.scheduler_config.max_num_seqs * vllm_config.max_concurrent_batches)


def _spec(kv_cache_config: Any) -> CaliDropSpec:
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    assert isinstance(spec, CaliDropSpec)
    return spec


def _model_shape(vllm_config: Any, kv_cache_config: Any) -> ModelShape:
    (group,) = kv_cache_config.kv_cache_groups
    return _shape(vllm_config, _spec(kv_cache_config), len(group.layer_names))


def _shape_of_runner(worker: Any) -> ModelShape:
    specs = worker.model_runner.get_kv_cache_spec()
    return _shape(worker.vllm_config, next(iter(specs.values())), len(specs))


def _shape(vllm_config: Any, spec: Any, num_layers: int) -> ModelShape:
    model = vllm_config.model_config
    return ModelShape(
        num_layers=num_layers,
        num_query_heads=model.get_num_attention_heads(vllm_config.parallel_config),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=spec.dtype,
        max_model_len=model.max_model_len,
    )
