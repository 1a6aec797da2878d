"""The worker's half of an engine, from vLLM's worker and the sizes of the pools."""

from __future__ import annotations

from typing import Any

from vllm_calidrop.evicted.pinned_pool import PinnedSwapPool
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.memory import ModelShape, PoolSizes, num_state_slots
from vllm_calidrop.ops.base import ModelKV
from vllm_calidrop.ops.flavour import uses_cuda_flavour
from vllm_calidrop.ops.registry import set_for
from vllm_calidrop.worker.worker import CaliDropWorker


def make_worker(worker: Any, pools: PoolSizes) -> CaliDropWorker:
    """One rank's tables, pools and operators, on the layers vLLM bound to its KV cache.

    Raises ValueError where no operator set serves the model, and on CUDA SelfCheckError where a kernel does not agree
    with float32 on the host.
    """
    runner, config = worker.model_runner, worker.vllm_config
    (group,) = runner.kv_cache_config.kv_cache_groups
    shape, num_slots = ModelShape.of_groups(config, runner.kv_cache_config), num_state_slots(config)
    layers = {name: config.compilation_config.static_forward_context[name] for name in group.layer_names}
    first = next(iter(layers.values()))
    model = ModelKV(
        dtype=shape.dtype,
        num_kv_heads=shape.num_kv_heads,
        group=shape.num_query_heads // shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=first.kv_cache.shape[2],
        isa=None if uses_cuda_flavour() else first.isa,
    )
    operators = set_for(model)
    where = (len(layers), pools.swap_blocks, shape.num_kv_heads, shape.head_dim, shape.dtype)
    pool = PinnedSwapPool(*where, runner.device) if uses_cuda_flavour() else SwapPool(*where)
    max_rows = config.scheduler_config.max_num_seqs
    ours = CaliDropWorker(
        runner, list(layers), shape, num_slots, pools, max_rows, runner.device, pool, operators, model
    )
    for name, layer in layers.items():
        layer.impl.attach(ours, ours.layer_index[name], layer.kv_cache)
    if uses_cuda_flavour():
        from vllm_calidrop.worker.self_check import self_check

        self_check(ours, first.kv_cache, first.impl.scale)
    return ours
