"""The CUDA backend's worker over CPU tensors, as worker/build.py makes it for a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_calidrop.evicted.pinned_pool import PinnedSwapPool
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.ops.base import ModelKV, OperatorSet
from vllm_calidrop.ops.triton.operators import TritonSet
from vllm_calidrop.worker.worker import CaliDropWorker

CPU = torch.device("cpu")


def cuda_worker(
    shape: ModelShape,
    *,
    runner: Any = None,
    num_slots: int = 16,
    swap_blocks: int = 8,
    max_rows: int = 8,
    block_size: int = 16,
    operators: type[OperatorSet] = TritonSet,
) -> CaliDropWorker:
    """Layers are called a0, a1, ...; runner: None where nothing asks it."""
    heads = (shape.num_kv_heads, shape.head_dim, shape.dtype)
    group = shape.num_query_heads // shape.num_kv_heads
    model = ModelKV(shape.dtype, shape.num_kv_heads, group, shape.head_dim, block_size, isa=None)
    pool = PinnedSwapPool(shape.num_layers, swap_blocks, *heads, CPU)
    names = [f"a{layer}" for layer in range(shape.num_layers)]
    pools = PoolSizes(swap_blocks, 0, 0)
    return CaliDropWorker(
        runner or SimpleNamespace(), names, shape, num_slots, pools, max_rows, CPU, pool, operators, model
    )
