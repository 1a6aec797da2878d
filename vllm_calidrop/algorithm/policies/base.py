"""The contract of an eviction policy: it declares what it looks at, and gives every prompt token an importance.

Which tokens are kept follows from the importance in the same way for all policies. What a policy needs decides how
much of a prefix-cache hit it may use and what a worker must hold while the prompt is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Flag, auto
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.placement import cacheable_hit, first_kept_block
from vllm_calidrop.algorithm.shape import KVShape


class Needs(Flag):
    """What a policy looks at. It gets exactly that in its ScoreInputs, on every device; the rest is None there."""

    NOTHING = 0
    KEYS = auto()
    WINDOW_QUERIES = auto()
    WINDOW_SUMS = auto()
    COLUMN_SUMS = auto()
    WINDOW = WINDOW_QUERIES | WINDOW_SUMS


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """What a policy may look at when a prompt's layer is compacted: H KV heads, P prompt tokens, Hq query heads.

    Keys and queries are those after RoPE. scale: 1 / sqrt(head_dim) as the model has it. device: of all tensors.
    keys: [H, P, D], the prompt's keys, any float dtype.
    window_queries: [window, Hq, D], the queries of the last `window` prompt positions, any float dtype.
    window_sums: float32 [H, P], the causal softmax attention of those queries, summed, mean over the group's heads.
    column_sums: float32 [H, P], the same of all prompt queries.
    """

    prompt_len: int
    num_kv_heads: int
    budget: int
    window: int
    sinks: int
    pool_kernel: int
    scale: float
    device: torch.device
    keys: Tensor | None = None
    window_queries: Tensor | None = None
    window_sums: Tensor | None = None
    column_sums: Tensor | None = None


class Selection(NamedTuple):
    """Prompt positions per KV head, ascending. kept: int64 [H, budget]; evicted: int64 [H, m], those worth storing."""

    kept: Tensor
    evicted: Tensor


class Policy(ABC):
    """One eviction policy. Stateless; implementations are registered in `policies/__init__.py` by their name."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.NOTHING

    def __init_subclass__(cls) -> None:
        if not isinstance(cls.needs, Needs):
            raise TypeError(f"the policy {cls.__name__} must say what it needs as Needs, not {cls.needs!r}")

    @abstractmethod
    def importance(self, inputs: ScoreInputs) -> Tensor:
        """float32 [H, P] on the inputs' device; +inf for tokens that are always kept. It must not wait for a GPU."""

    def select(self, inputs: ScoreInputs, calibration_tokens: int) -> Selection:
        """The `budget` most important tokens of every KV head and the next `calibration_tokens` ones.

        Ties go to the lower position. Requires 0 < budget < P and calibration_tokens <= P - budget.
        """
        assert 0 < inputs.budget < inputs.prompt_len, (inputs.budget, inputs.prompt_len)
        importance = self.importance(inputs)
        expected = (inputs.num_kv_heads, inputs.prompt_len)
        if importance.shape != expected or importance.dtype != torch.float32:
            raise ValueError(
                f"the policy {self.name} gave {importance.dtype} {tuple(importance.shape)} as importance instead of "
                f"torch.float32 {expected}"
            )
        order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
        kept = order[:, : inputs.budget]
        evicted = order[:, inputs.budget : inputs.budget + calibration_tokens]
        return Selection(kept.sort(-1).values, evicted.sort(-1).values)

    def last_queries(self, window: int, others: int = 0) -> int:
        """Of how many of the last prompt positions the queries are looked at: by this policy its window's, if any, and
        by somebody else those of `others` positions."""
        return max(window if self.needs & Needs.WINDOW else 0, others)

    def allowed_hit(
        self, hit_tokens: int, prompt_len: int, budget: int, window: int, block_size: int, others: int = 0
    ) -> int:
        """How much of a prefix-cache hit may be used, in tokens: the queries that are looked at must be computed."""
        if Needs.COLUMN_SUMS in self.needs:
            return 0
        first_block = first_kept_block(prompt_len, budget, block_size)
        return cacheable_hit(hit_tokens, prompt_len, first_block, self.last_queries(window, others), block_size)

    def prefill_bytes(self, shape: KVShape, window: int, prompt_len: int, others: int = 0) -> int:
        """Bytes that a worker holds for one sequence until its prompt is complete: last queries and column sums."""
        num_bytes = 0
        if Needs.COLUMN_SUMS in self.needs:
            num_bytes += shape.num_layers * shape.num_kv_heads * prompt_len * torch.float32.itemsize
        query_bytes = shape.num_query_heads * shape.head_dim * shape.dtype.itemsize
        return num_bytes + shape.num_layers * self.last_queries(window, others) * query_bytes
