"""The contract of an eviction policy: it gives every prompt token an importance; the selection is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at when a prompt's layer is compacted. All after RoPE.

    keys: [H, P, D], the prompt's keys, any float dtype.
    window_queries: [window, Hq, D], queries of the last `window` prompt positions; given if `needs_window_queries`.
    column_sums: [H, P] float32, H2O's accumulated attention; given if `needs_column_sums`.
    window_sums: [H, P] float32, the same of the window's queries alone, where an operator has summed it already.
    scale: 1 / sqrt(head_dim) as the model has it.
    """

    keys: Tensor
    budget: int
    window: int
    sinks: int
    pool_kernel: int
    scale: float
    window_queries: Tensor | None = None
    column_sums: Tensor | None = None
    window_sums: Tensor | None = None

    @property
    def prompt_len(self) -> int:
        return self.keys.shape[1]


class Selection(NamedTuple):
    """Prompt positions per KV head, ascending. kept: int64 [H, budget]; evicted: int64 [H, m], those worth storing."""

    kept: Tensor
    evicted: Tensor


class Policy(ABC):
    """One eviction policy. Stateless; implementations are registered in `policies/__init__.py`."""

    name: ClassVar[str]
    needs_window_queries: ClassVar[bool] = False
    needs_column_sums: ClassVar[bool] = False

    @abstractmethod
    def importance(self, inputs: ScoreInputs) -> Tensor:
        """float32 [H, P]; +inf for tokens that are always kept."""

    def select(self, inputs: ScoreInputs, calibration_tokens: int) -> Selection:
        """The `budget` most important tokens of every KV head and the next `calibration_tokens` ones.

        Ties go to the lower position. Requires 0 < budget < P and calibration_tokens <= P - budget.
        """
        assert 0 < inputs.budget < inputs.prompt_len, (inputs.budget, inputs.prompt_len)
        order = torch.sort(self.importance(inputs), dim=-1, descending=True, stable=True).indices
        kept = order[:, : inputs.budget]
        evicted = order[:, inputs.budget : inputs.budget + calibration_tokens]
        return Selection(kept.sort(-1).values, evicted.sort(-1).values)
