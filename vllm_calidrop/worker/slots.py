"""What holds for a sequence until it ends, by state slot: the tables `Sequences` and `Recall` of the operators.

They lie beside the KV cache at fixed addresses. On a GPU the host keeps a copy of the small ones, which is uploaded as
a whole when sequences are admitted; on CPU the tables are that copy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import CODECS, Layout, layout_table, number_of
from vllm_calidrop.evicted.layout import MAX_BUFFER, swap_blocks_for
from vllm_calidrop.evicted.recall.values import BITS
from vllm_calidrop.ops.contract import NO_BUDGET, Recall, Sequences
from vllm_calidrop.records import SequenceRecord
from vllm_calidrop.worker.step import upload

_INTEGERS = ("start", "stored", "gate", "codec", "most_reads", "recalled", "most", "buffer_size", "rest")
_FLOATS = ("theta1", "theta2", "look_theta", "eps", "top_p")


class SlotTables:
    """The tables of all state slots. sequences, recall: views of them, as the operators take them."""

    def __init__(
        self, num_slots: int, max_model_len: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._integers = np.zeros((len(_INTEGERS), num_slots), dtype=np.int32)
        self._floats = np.zeros((len(_FLOATS), num_slots), dtype=np.float32)
        on_host = device.type == "cpu"
        self._device = tuple(
            torch.from_numpy(table) if on_host else torch.from_numpy(table).to(device)
            for table in (self._integers, self._floats)
        )
        of = dict(zip((*_INTEGERS, *_FLOATS), (*self._device[0], *self._device[1]), strict=True))
        blocks = (num_slots, swap_blocks_for(max_model_len))
        self.sequences = Sequences(
            start=of["start"],
            stored=of["stored"],
            theta1=of["theta1"],
            theta2=of["theta2"],
            gate=of["gate"],
            swap_blocks=torch.zeros(blocks, dtype=torch.int32, device=device),
            codec=of["codec"],
            most_reads=of["most_reads"],
            layouts=layout_table(head_dim, dtype, device),
        )
        self.recall = Recall(
            stored=of["recalled"],
            theta=of["look_theta"],
            eps=of["eps"],
            top_p=of["top_p"],
            most=of["most"],
            buffer_size=of["buffer_size"],
            rest=of["rest"],
            sketch_blocks=torch.zeros(blocks, dtype=torch.int32, device=device),
            buffer_ids=torch.zeros((num_slots, MAX_BUFFER), dtype=torch.int32, device=device),
        )

    @staticmethod
    def num_bytes(num_slots: int, max_model_len: int) -> int:
        """Bytes of the tables beside the KV cache."""
        layout_bytes = 4 * len(Layout._fields) * len(CODECS)
        per_slot = len(_INTEGERS) + len(_FLOATS) + 2 * swap_blocks_for(max_model_len) + MAX_BUFFER
        return num_slots * 4 * per_slot + layout_bytes

    def admit(self, records: list[SequenceRecord]) -> None:
        """A step's new sequences. Steps in flight read other slots, or come before this in the stream."""
        for record in records:
            recall, slot = record.recall, record.slot
            self._integers[:, slot] = (
                record.prompt_len - record.budget,
                0 if recall else record.stored,
                record.gate,
                number_of(record.codec),
                NO_BUDGET if record.most_reads is None else min(record.most_reads, NO_BUDGET),
                record.stored if recall else 0,
                recall.most if recall else 0,
                len(recall.buffer_ids) if recall else 0,
                BITS[recall.rest] if recall else 0,
            )
            top_p = recall.top_p if recall and recall.top_p is not None else math.nan
            self._floats[:, slot] = (
                record.theta1,
                record.theta2,
                recall.theta if recall else 0,
                recall.eps if recall else 0,
                top_p,
            )
            _put(record.swap_blocks, self.sequences.swap_blocks[slot])
            if recall:
                _put(recall.sketch_blocks, self.recall.sketch_blocks[slot])
                _put(recall.buffer_ids, self.recall.buffer_ids[slot])
        if records:
            for host, device in zip((self._integers, self._floats), self._device, strict=True):
                if device.device.type != "cpu":
                    upload(host, device)


def _put(ids: tuple[int, ...], out: Tensor) -> None:
    if ids:
        upload(np.array(ids, dtype=np.int32), out[: len(ids)])
