"""The arithmetic of right-aligned compaction (docs/life-of-a-request.md): which block, which slot, which column.

P prompt tokens, budget B < P, block size bs. The kept tokens of every KV head lie in slots [P - B, P), outputs follow
from P on, so slot mapping and positions of later tokens stay as vLLM has them. Blocks [0, g) hold nothing needed any
more; block g may begin with tokens that are no longer attended.
"""

from __future__ import annotations

SWAP_BLOCK_TOKENS = 128
PAGE_TOKENS = 16
PAGES_PER_BLOCK = SWAP_BLOCK_TOKENS // PAGE_TOKENS


def first_kept_block(prompt_len: int, budget: int, block_size: int) -> int:
    """g: the blocks below it are freed after compaction."""
    return max(0, prompt_len - budget) // block_size


def view_start(prompt_len: int, budget: int, block_size: int) -> int:
    """Offset, in tokens, of the first attended token inside block g."""
    return max(0, prompt_len - budget) % block_size


def swap_blocks_for(tokens: int) -> int:
    """Blocks of SWAP_BLOCK_TOKENS that hold `tokens` evicted tokens of every KV head and layer: swap blocks without a
    codec, sketch blocks always."""
    return -(-tokens // SWAP_BLOCK_TOKENS)


def pages_for(tokens: int) -> int:
    """Pages of `tokens` evicted tokens of one KV head; the last may be part empty."""
    return -(-tokens // PAGE_TOKENS)


def cacheable_hit(hit_tokens: int, prompt_len: int, first_block: int, window: int, block_size: int) -> int:
    """The longest prefix-cache hit a sequence that will be compacted may use, in tokens, a multiple of block_size.

    Blocks from g on will be overwritten, so they must be the sequence's own; the queries of the last `window` prompt
    positions must be computed, because the policy needs them.
    """
    limit = min(hit_tokens, first_block * block_size, prompt_len - window)
    return max(0, limit) // block_size * block_size
