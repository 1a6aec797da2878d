"""How evicted KV is cut: blocks that a pool gives out, and the pages inside them that recall reads alone."""

from __future__ import annotations

SWAP_BLOCK_TOKENS = 128
PAGE_TOKENS = 16
PAGES_PER_BLOCK = SWAP_BLOCK_TOKENS // PAGE_TOKENS
MAX_BUFFER = 64  # places for pages in the page buffer of one KV head


def swap_blocks_for(tokens: int) -> int:
    """Blocks of SWAP_BLOCK_TOKENS that hold `tokens` evicted tokens of every KV head and layer: swap blocks without a
    codec, sketch blocks always."""
    return -(-tokens // SWAP_BLOCK_TOKENS)


def pages_for(tokens: int) -> int:
    """Pages of `tokens` evicted tokens of one KV head; the last may be part empty."""
    return -(-tokens // PAGE_TOKENS)
