"""Whether admitting a request now would force a preemption later: room for prompts in prefill and for certain outputs.

vLLM admits a request as soon as its prompt fits, and preempts the newest when a running one finds no block. A prompt
that will be compacted is large only for a while, so waiting for it costs less than computing somebody again. Without
any budget in sight vLLM's own rule stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_calidrop.scheduler.admission import evicts, freed_blocks, prefill_bytes
from vllm_calidrop.scheduler.living import Living, settings_of
from vllm_calidrop.scheduler.shape import Shape

if TYPE_CHECKING:
    from vllm.v1.request import Request


class KVBlocks(NamedTuple):
    """vLLM's block pool as it is now. total, free: blocks. held: by request id. shared: blocks of the request's prefix
    hit that somebody else holds, so that they cost nothing. chunk: most prompt tokens of a step."""

    total: int
    free: int
    held: Mapping[str, int]
    shared: int
    chunk: int


def must_wait(request: Request, others: Sequence[Living], blocks: KVBlocks, shape: Shape, state_limit: int) -> bool:
    """Whether `request` should not be admitted beside `others` yet. state_limit: bytes for prompts in prefill."""
    prompt_len, settings = request.num_prompt_tokens, settings_of(request)
    compresses = evicts(settings, prompt_len)
    if not others or not (compresses or any(other.record for other in others)):
        return False
    if outgrows(request, others, blocks.total, shape):
        return True
    if _lacks_headroom(request, others, blocks, shape.block_size):
        return True
    prefilling = [other.request for other in others if other.in_prefill]
    if not compresses or not prefilling:
        return False
    held = sum(prefill_bytes(settings_of(other), other.num_prompt_tokens, shape) for other in prefilling)
    return held + prefill_bytes(settings, prompt_len, shape) > state_limit


def _lacks_headroom(request: Request, others: Sequence[Living], blocks: KVBlocks, block_size: int) -> bool:
    """Headroom is kept for what other prompts in prefill have yet to allocate, and for what decoding sequences will
    grow by while this prompt is computed: in steps of at most `chunk` tokens, of which every sequence may take one and
    older prompts come first."""
    needed = -(-request.num_tokens // block_size) - blocks.shared
    to_compute = request.num_tokens + sum(
        max(0, other.request.num_tokens - other.request.num_computed_tokens) for other in others
    )
    steps = -(-to_compute // max(1, blocks.chunk - len(others)))
    for other in others:
        missing = -(-other.request.num_tokens // block_size) - blocks.held.get(other.request.request_id, 0)
        needed += max(0, missing) + -(-steps // block_size)
    return needed > blocks.free


def outgrows(request: Request, others: Sequence[Living], total_blocks: int, shape: Shape) -> bool:
    """Whether outputs that are certain to come would not fit beside each other, each prompt at its compressed size."""
    requests = [*(other.request for other in others), request]
    mine = freed_blocks(settings_of(request), request.num_prompt_tokens, shape)
    freed = [*(other.first_block for other in others), mine]
    if not others or not any(freed):
        return False
    held = [each.num_tokens - gone * shape.block_size for each, gone in zip(requests, freed, strict=True)]
    return most_blocks(held, [certain_outputs(each) for each in requests], shape.block_size) > total_blocks


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
