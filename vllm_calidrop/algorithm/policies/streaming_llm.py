"""StreamingLLM (arXiv 2309.17453): attention sinks and the most recent tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.algorithm.policies.base import Policy, ScoreInputs


class StreamingLLM(Policy):
    """The importance of a token is its position, so what is evicted latest is also calibrated with first."""

    name = "streaming_llm"

    def importance(self, inputs: ScoreInputs) -> Tensor:
        importance = torch.arange(inputs.prompt_len, dtype=torch.float32, device=inputs.device)
        importance[: inputs.sinks] = torch.inf
        return importance.expand(inputs.num_kv_heads, -1)
