"""SnapKV (arXiv 2404.14469): what the last queries of the prompt attended to, smoothed, plus those last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.policies.base import Policy, ScoreInputs


class SnapKV(Policy):
    """Settings of the CaliDrop paper, section 4.1.3: window 32, average pool with kernel 5 (zero padding counted)."""

    name = "snapkv"
    needs_window_queries = True

    def importance(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.window_queries is not None
        heads, prompt_len, head_dim = inputs.keys.shape
        window = inputs.window
        queries = inputs.window_queries.float().view(window, heads, -1, head_dim).permute(1, 2, 0, 3)
        logits = torch.matmul(queries, inputs.keys.float().transpose(-1, -2).unsqueeze(1)) * inputs.scale
        position = torch.arange(prompt_len, device=logits.device)
        logits.masked_fill_(position > position[prompt_len - window :, None], -torch.inf)
        attention = torch.softmax(logits, dim=-1)[..., : prompt_len - window]
        per_head = attention.sum(dim=-2).mean(dim=1)
        pooled = torch.nn.functional.avg_pool1d(
            per_head, inputs.pool_kernel, stride=1, padding=inputs.pool_kernel // 2, count_include_pad=True
        )
        return torch.nn.functional.pad(pooled, (0, window), value=torch.inf)
