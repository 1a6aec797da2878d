"""What this backend takes of a GPU's memory; the swap pool is the host's."""

from __future__ import annotations

from typing import Any

import torch

from vllm_calidrop.attention.cuda.host_pool import staging_bytes
from vllm_calidrop.attention.cuda.worker import CaliDropCudaWorker
from vllm_calidrop.memory import ModelShape, footprint
from vllm_calidrop.settings import ServerSettings

GIB = 2**30


def device_bytes(shape: ModelShape, num_slots: int, max_rows: int, settings: ServerSettings) -> int:
    """State table, tables, scratch and staging at their fixed addresses; stashes and scratch of prompts in prefill.

    Staging as large as it can be: the swap pool is sized later.
    """
    ours = footprint(shape, num_slots, settings)
    fixed = CaliDropCudaWorker.num_bytes(shape, num_slots, max_rows)
    staging = staging_bytes(2**31, shape.num_kv_heads, shape.head_dim, shape.dtype)
    return ours.state_table + fixed + staging + ours.prefill_state + ours.scratch


def leave_room_on_device(
    shape: ModelShape, num_slots: int, settings: ServerSettings, vllm_config: Any, available: int
) -> int:
    """What of `available` bytes the KV pool may take. One of fixed size is not shrunk: the sum is checked instead."""
    ours = device_bytes(shape, num_slots, vllm_config.scheduler_config.max_num_seqs, settings)
    if vllm_config.cache_config.kv_cache_memory_bytes is not None:
        free = torch.cuda.mem_get_info()[0]
        if available + ours > free:
            raise ValueError(
                f"calidrop: the fixed KV pool ({available / GIB:.2f} GiB), state table and scratch "
                f"({ours / GIB:.2f} GiB) are more than the free device memory ({free / GIB:.2f} GiB)"
            )
        return available
    rest = available - ours
    if rest <= 0:
        raise ValueError(
            f"calidrop: nothing of the available {available / GIB:.2f} GiB is left for the KV pool after state table "
            f"and scratch ({ours / GIB:.2f} GiB); lower --max-num-seqs or --max-model-len"
        )
    return rest
