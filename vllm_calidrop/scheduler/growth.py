"""Outputs that are certain to come, and the blocks they will take: what admission can know of the future."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.request import Request


def certain_outputs(request: Request) -> int:
    """Tokens `request` will surely still generate; nothing is certain of a request that may stop by itself."""
    params = request.sampling_params
    if params is None:
        return 0
    to_the_end = params.ignore_eos and not params.stop and not params.stop_token_ids
    return max(0, (request.max_tokens if to_the_end else params.min_tokens) - request.num_output_tokens)


def most_blocks(held: Sequence[int], left: Sequence[int], block_size: int) -> int:
    """The most blocks that sequences of `held` tokens will hold together while each generates its `left` tokens.

    Every sequence makes one token a step and gives its blocks back after its last one, so the most is held when
    somebody ends.
    """
    tokens, remaining = np.array(held, dtype=np.int64), np.array(left, dtype=np.int64)
    ends = remaining[:, None]
    blocks = -(-(tokens + ends) // block_size)
    return int((blocks * (remaining >= ends)).sum(1).max(initial=0))
