"""The arithmetic of right-aligned compaction (docs/life-of-a-request.md): which block, which slot, which column.

P prompt tokens, budget B < P, block size bs. The kept tokens of every KV head lie in slots [P - B, P), outputs follow
from P on, so slot mapping and positions of later tokens stay as vLLM has them. Blocks [0, g) hold nothing needed any
more; block g may begin with tokens that are no longer attended.
"""

from __future__ import annotations


def first_kept_block(prompt_len: int, budget: int, block_size: int) -> int:
    """g: the blocks below it are freed after compaction."""
    return max(0, prompt_len - budget) // block_size


def view_start(prompt_len: int, budget: int, block_size: int) -> int:
    """Offset, in tokens, of the first attended token inside block g."""
    return max(0, prompt_len - budget) % block_size


def cacheable_hit(hit_tokens: int, prompt_len: int, first_block: int, window: int, block_size: int) -> int:
    """The longest prefix-cache hit a sequence that will be compacted may use, in tokens, a multiple of block_size.

    Blocks from g on will be overwritten, so they must be the sequence's own; the queries of the last `window` prompt
    positions must be computed, because the policy needs them.
    """
    limit = min(hit_tokens, first_block * block_size, prompt_len - window)
    return max(0, limit) // block_size * block_size
