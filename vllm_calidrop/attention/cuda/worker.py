"""One GPU worker's side: everything at a fixed address, made before CUDA graphs are captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.attention.cuda.host_pool import PinnedSwapPool
from vllm_calidrop.attention.cuda.slot_table import SlotTable
from vllm_calidrop.attention.cuda.step_table import StepTable
from vllm_calidrop.attention.ops.triton import Scratch, State, make_scratch, scratch_bytes, view_scratch
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.records import StepRecords
from vllm_calidrop.worker import CaliDropWorker


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
        self.slots = SlotTable(num_slots, shape.max_model_len, device)
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

    def has_unfinished_prompt(self) -> bool:
        """Whether a prompt of this step will be compacted and is not complete before it: no full CUDA graph then."""
        return any(self._done(i) < self._record(i).compaction_point for i in self._step_ids)

    def close(self) -> None:
        self.pool.close()

    def _make_pool(self, *shape: Any) -> PinnedSwapPool:
        return PinnedSwapPool(*shape, self._device)

    def _record(self, request_id: str) -> Any:
        sequence = self.sequences.get(request_id)
        assert sequence is not None
        return sequence.record

    def _done(self, request_id: str) -> int:
        """Tokens of a request that are computed before this step: V2 keeps them in its request table, V1 in its batch."""
        if hasattr(self.runner, "req_states"):
            states = self.runner.req_states
            return int(states.num_computed_tokens_np[states.req_id_to_index[request_id]])
        batch = self.runner.input_batch
        return int(batch.num_computed_tokens_cpu[batch.req_id_to_index[request_id]])
