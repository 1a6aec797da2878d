"""The worker's half of an engine, from vLLM's worker and the sizes of the pools."""

from __future__ import annotations

from typing import Any

from vllm_calidrop.memory import ModelShape, PoolSizes, num_state_slots
from vllm_calidrop.ops.flavour import uses_cuda_flavour
from vllm_calidrop.worker.worker import CaliDropWorker


def make_worker(worker: Any, pools: PoolSizes) -> CaliDropWorker:
    """One rank's state table, pools and sequences, on the layers vLLM bound to its KV cache."""
    runner, config = worker.model_runner, worker.vllm_config
    (group,) = runner.kv_cache_config.kv_cache_groups
    layer_names = list(group.layer_names)
    shape, num_slots = ModelShape.of_groups(config, runner.kv_cache_config), num_state_slots(config)
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
