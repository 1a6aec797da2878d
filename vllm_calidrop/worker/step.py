"""What changes from step to step: one small table at a fixed address beside the KV cache, filled by one copy.

CUDA graphs record its address; a replay reads what the builder has written for its batch. Rows that are not compacted,
and those that pad a captured batch, have end = 0: our operators leave them alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_calidrop.ops.contract import Rows

_SLOT, _TOKEN, _END, _STOCK = range(4)
# What vLLM's operator is told of a row that we answer: one token to read, and an answer that ours replaces.
_STOCK_LEN = 1


class StepTable:
    """int32 [4, max_rows]: of every row of the batch its slot, token and end (as `Rows` has them), and stock_lens.

    stock_lens: what vLLM's own operator attends of each row: all of it, or _STOCK_LEN where the row is ours.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.table = torch.zeros((4, max_rows), dtype=torch.int32, device=device)
        self.clear()

    @staticmethod
    def num_bytes(max_rows: int) -> int:
        return 4 * max_rows * 4

    @property
    def stock_lens(self) -> Tensor:
        return self.table[_STOCK]

    def rows(self, num_rows: int, block_table: Tensor) -> Rows:
        """The first rows as the operators want them; the tensors are views, whatever is written later."""
        return Rows(
            slot=self.table[_SLOT, :num_rows],
            token=self.table[_TOKEN, :num_rows],
            end=self.table[_END, :num_rows],
            block_table=block_table,
        )

    def clear(self) -> None:
        """No row is ours, and none has a token."""
        self.table.zero_()
        self.table[_SLOT].fill_(-1)

    def write(self, mine: np.ndarray, slots: np.ndarray, first_tokens: np.ndarray, seq_lens: np.ndarray) -> None:
        """Fill in a step. mine: bool [n], rows that attend a compacted prompt; slots, first_tokens, seq_lens: int [n].

        n is at most max_rows; the rows after it are padding.
        """
        num_rows = len(mine)
        table = np.zeros(tuple(self.table.shape), dtype=np.int32)
        table[_SLOT] = -1
        table[_SLOT, :num_rows] = np.where(mine, slots, -1)
        table[_TOKEN, :num_rows] = np.where(mine, first_tokens, 0)
        table[_END, :num_rows] = np.where(mine, seq_lens, 0)
        table[_STOCK, :num_rows] = np.where(mine, _STOCK_LEN, seq_lens)
        upload(table, self.table)


def upload(values: np.ndarray, out: Tensor) -> None:
    """Copy `values` into `out` in stream order. The pinned buffer between comes from torch's cache of them, which hands
    it out again only when the copy is done."""
    host = torch.from_numpy(values)
    if out.device.type != "cpu":
        host = host.pin_memory()
    out.copy_(host, non_blocking=True)
