"""What holds for a sequence until it ends, on the device, by state slot: `contract.Sequences`, filled at admission."""

from __future__ import annotations

import numpy as np
import torch

from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.codecs.layout import Layout, layout_table, layouts
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.ops.triton import NO_BUDGET, Sequences
from vllm_calidrop.records import SequenceRecord
from vllm_calidrop.worker.upload import upload

_FIELDS = ("start", "stored", "gate", "codec", "most_reads", "theta1", "theta2")
_INTEGERS = 5


class SlotTable:
    """Tensors at fixed addresses, and the host's copy of the small ones, which is uploaded as a whole."""

    def __init__(
        self, num_slots: int, max_model_len: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._host = np.zeros((len(_FIELDS), num_slots), dtype=np.int32)
        self._thetas = self._host[_INTEGERS:].view(np.float32)
        self._device = torch.zeros(self._host.shape, dtype=torch.int32, device=device)
        swap_blocks = torch.zeros((num_slots, swap_blocks_for(max_model_len)), dtype=torch.int32, device=device)
        start, stored, gate, codec, most_reads = self._device[:_INTEGERS]
        theta1, theta2 = self._device[_INTEGERS:].view(torch.float32)
        self.sequences = Sequences(
            start=start,
            stored=stored,
            gate=gate,
            theta1=theta1,
            theta2=theta2,
            swap_blocks=swap_blocks,
            codec=codec,
            most_reads=most_reads,
            layouts=layout_table(head_dim, dtype, device),
        )

    @staticmethod
    def num_bytes(num_slots: int, max_model_len: int) -> int:
        layout_bytes = 4 * len(Layout._fields) * len(layouts(64, torch.float32))
        return num_slots * 4 * (len(_FIELDS) + swap_blocks_for(max_model_len)) + layout_bytes

    def admit(self, records: list[SequenceRecord]) -> None:
        """A step's new sequences. Steps in flight read other slots, or come before this in the stream."""
        for record in records:
            assert record.recall is None, record
            slot = record.slot
            most_reads = NO_BUDGET if record.most_reads is None else min(record.most_reads, NO_BUDGET)
            first = record.prompt_len - record.budget
            codec = number_of(record.codec)
            self._host[:_INTEGERS, slot] = (first, record.stored, record.gate, codec, most_reads)
            self._thetas[:, slot] = (record.theta1, record.theta2)
            if record.swap_blocks:
                blocks = np.array(record.swap_blocks, dtype=np.int32)
                upload(blocks, self.sequences.swap_blocks[slot, : len(blocks)])
        if records:
            upload(self._host, self._device)
