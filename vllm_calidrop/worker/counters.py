"""Counters on their way to the host: copied beside the sampled tokens, read when those are read."""

from __future__ import annotations

import torch
from torch import Tensor


class PendingCounts:
    """A copy of some counters that is under way. `wait` is for the thread that reads the step's output."""

    def __init__(self, counts: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if counts.device.type == "cpu":
            self._host = counts
            return
        self._host = counts.to("cpu", non_blocking=True)  # into pinned memory
        self._event = torch.cuda.Event(blocking=True)
        self._event.record()
        self._source = counts  # until the copy is done

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
