"""SnapKV (arXiv 2404.14469): what the last queries of the prompt attended to, smoothed, plus those last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies.base import Policy, ScoreInputs
from vllm_calidrop.algorithm.policies.h2o import add_column_sums


class SnapKV(Policy):
    """Settings of the CaliDrop paper, section 4.1.3: window 32, average pool with kernel 5 (zero padding counted)."""

    name = "snapkv"
    needs_window_queries = True

    def importance(self, inputs: ScoreInputs) -> Tensor:
        heads, prompt_len, _ = inputs.keys.shape
        before = prompt_len - inputs.window
        votes = inputs.window_sums
        if votes is None:
            assert inputs.window_queries is not None
            votes = torch.zeros((heads, prompt_len), dtype=torch.float32, device=inputs.keys.device)
            add_column_sums(votes, inputs.window_queries, inputs.keys, before, inputs.scale)
        pooled = torch.nn.functional.avg_pool1d(
            votes[:, :before], inputs.pool_kernel, stride=1, padding=inputs.pool_kernel // 2, count_include_pad=True
        )
        return torch.nn.functional.pad(pooled, (0, inputs.window), value=torch.inf)
