"""What holds for a sequence until it ends, on the device, by state slot: `contract.Sequences`, filled at admission."""

from __future__ import annotations

import numpy as np
import torch

from vllm_calidrop.attention.cuda.upload import upload
from vllm_calidrop.attention.ops.triton import Sequences
from vllm_calidrop.cache.layout import swap_blocks_for
from vllm_calidrop.records import SequenceRecord

_FIELDS = ("start", "stored", "gate", "theta1", "theta2")


class SlotTable:
    """Tensors at fixed addresses, and the host's copy of the small ones, which is uploaded as a whole."""

    def __init__(self, num_slots: int, max_model_len: int, device: torch.device) -> None:
        self._host = np.zeros((len(_FIELDS), num_slots), dtype=np.int32)
        self._thetas = self._host[3:].view(np.float32)
        self._device = torch.zeros(self._host.shape, dtype=torch.int32, device=device)
        swap_blocks = torch.zeros((num_slots, swap_blocks_for(max_model_len)), dtype=torch.int32, device=device)
        theta1, theta2 = self._device[3].view(torch.float32), self._device[4].view(torch.float32)
        self.sequences = Sequences(
            start=self._device[0],
            stored=self._device[1],
            gate=self._device[2],
            theta1=theta1,
            theta2=theta2,
            swap_blocks=swap_blocks,
        )

    @staticmethod
    def num_bytes(num_slots: int, max_model_len: int) -> int:
        return num_slots * 4 * (len(_FIELDS) + swap_blocks_for(max_model_len))

    def admit(self, records: list[SequenceRecord]) -> None:
        """A step's new sequences. Steps in flight read other slots, or come before this in the stream."""
        for record in records:
            assert record.recall is None and record.codec == "none" and record.most_reads is None, record
            slot = record.slot
            self._host[:3, slot] = (record.prompt_len - record.budget, record.stored, record.gate)
            self._thetas[:, slot] = (record.theta1, record.theta2)
            if record.swap_blocks:
                blocks = np.array(record.swap_blocks, dtype=np.int32)
                upload(blocks, self.sequences.swap_blocks[slot, : len(blocks)])
        if records:
            upload(self._host, self._device)
