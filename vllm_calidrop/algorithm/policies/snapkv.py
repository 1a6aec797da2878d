"""SnapKV (arXiv 2404.14469): what the last queries of the prompt attended to, smoothed, plus those last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies.base import Needs, Policy, ScoreInputs


class SnapKV(Policy):
    """Settings of the CaliDrop paper, section 4.1.3: window 32, average pool with kernel 5 (zero padding counted)."""

    name = "snapkv"
    needs = Needs.WINDOW_SUMS

    def importance(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.window_sums is not None
        votes = inputs.window_sums[:, : inputs.prompt_len - inputs.window]
        pooled = torch.nn.functional.avg_pool1d(
            votes, inputs.pool_kernel, stride=1, padding=inputs.pool_kernel // 2, count_include_pad=True
        )
        return torch.nn.functional.pad(pooled, (0, inputs.window), value=torch.inf)
