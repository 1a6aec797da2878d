"""One GPU worker's side: everything at a fixed address, made before CUDA graphs are captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_calidrop.evicted.pinned_pool import PinnedSwapPool
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.ops.triton import Scratch, State, make_scratch, scratch_bytes, view_scratch
from vllm_calidrop.records import StepRecords
from vllm_calidrop.worker.slot_table import SlotTable
from vllm_calidrop.worker.step_table import StepTable
from vllm_calidrop.worker.upload import upload
from vllm_calidrop.worker.worker import CaliDropWorker


class CaliDropCudaWorker(CaliDropWorker):
    """max_rows: sequences of a batch at most."""

    pool: PinnedSwapPool

    def __init__(
        self,
        runner: Any,
        layer_names: list[str],
        shape: ModelShape,
        num_slots: int,
        pools: PoolSizes,
        device: torch.device,
        max_rows: int,
    ) -> None:
        self._device = device
        super().__init__(runner, layer_names, shape, num_slots, pools)
        self.max_rows = max_rows
        self.slots = SlotTable(num_slots, shape.max_model_len, shape.head_dim, shape.dtype, device)
        self.step = StepTable(max_rows, device)
        self._heads = (shape.num_kv_heads, shape.num_query_heads // shape.num_kv_heads, shape.head_dim)
        self._scratch = make_scratch(max_rows, *self._heads, device)
        self._states = [
            State(self.table.query[layer], self.table.out[layer], self.table.lse[layer], self.table.counts[:, layer])
            for layer in range(shape.num_layers)
        ]

    @staticmethod
    def num_bytes(shape: ModelShape, num_slots: int, max_rows: int) -> int:
        """Bytes on the device beside the state table (memory.py)."""
        group = shape.num_query_heads // shape.num_kv_heads
        return (
            SlotTable.num_bytes(num_slots, shape.max_model_len)
            + StepTable.num_bytes(max_rows)
            + scratch_bytes(max_rows, shape.num_kv_heads, group, shape.head_dim)
        )

    @property
    def device(self) -> torch.device:
        return self._device

    def begin_step(self, step: StepRecords | None, scheduled_ids: list[str]) -> None:
        super().begin_step(step, scheduled_ids)
        self.pool.join()
        if step is not None:
            self.slots.admit(step.admitted)

    def state(self, layer: int) -> State:
        return self._states[layer]

    def pages(self, layer: int) -> Tensor:
        """One layer of the swap pool as the operators read it."""
        return self.pool.device_pages[layer]

    def scratch(self, num_rows: int) -> Scratch:
        return view_scratch(self._scratch, num_rows, *self._heads)

    def _counts_of(self, slots: list[int]) -> Tensor:
        if not slots:
            return self.table.counts[:0]
        index = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        upload(np.array(slots, dtype=np.int64), index)
        return self.table.counts.index_select(0, index)

    def close(self) -> None:
        self.pool.close()

    def _make_pool(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> PinnedSwapPool:
        return PinnedSwapPool(num_layers, num_blocks, num_kv_heads, head_dim, dtype, self._device)
