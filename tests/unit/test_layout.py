"""The arithmetic of right-aligned compaction, by counting tokens and blocks one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_calidrop.algorithm.placement import cacheable_hit, first_kept_block, view_start
from vllm_calidrop.evicted.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS, swap_blocks_for

BLOCK_SIZES = st.sampled_from([1, 16, 32, 128])
LENGTHS = st.integers(1, 2000)


@given(LENGTHS, LENGTHS, BLOCK_SIZES)
def test_view_begins_with_the_first_kept_slot(prompt_len: int, budget: int, block_size: int) -> None:
    """Kept tokens lie in the last `budget` slots of the prompt: count the slots before them."""
    kept_slots = list(range(prompt_len))[-budget:]
    first_block, offset = divmod(kept_slots[0], block_size)
    assert first_kept_block(prompt_len, budget, block_size) == first_block
    assert view_start(prompt_len, budget, block_size) == offset


@given(LENGTHS, LENGTHS, BLOCK_SIZES)
def test_freed_blocks_hold_no_kept_token_and_no_other_block_could_be_freed(
    prompt_len: int, budget: int, block_size: int
) -> None:
    blocks_with_kept_tokens = {slot // block_size for slot in list(range(prompt_len))[-budget:]}
    freed = set(range(first_kept_block(prompt_len, budget, block_size)))
    prompt_blocks = set(range(-(-prompt_len // block_size)))
    assert prompt_blocks - blocks_with_kept_tokens == freed


@given(st.integers(0, 5000))
def test_swap_blocks_are_just_enough(tokens: int) -> None:
    blocks = swap_blocks_for(tokens)
    assert blocks * SWAP_BLOCK_TOKENS >= tokens
    assert blocks == 0 or (blocks - 1) * SWAP_BLOCK_TOKENS < tokens


def test_pages_fill_a_swap_block() -> None:
    assert SWAP_BLOCK_TOKENS % PAGE_TOKENS == 0


@given(st.integers(0, 600), st.integers(2, 600), st.data(), BLOCK_SIZES)
def test_hit_is_the_longest_that_is_safe(hit: int, prompt_len: int, data: st.DataObject, block_size: int) -> None:
    """Whole blocks, none that compaction writes, no position whose query the policy needs: try them all."""
    budget = data.draw(st.integers(1, prompt_len - 1))
    window = data.draw(st.integers(0, budget))
    written = set(range(prompt_len - budget, prompt_len))
    observed = set(range(prompt_len - window, prompt_len))

    def safe(tokens: int) -> bool:
        whole_blocks = tokens % block_size == 0
        in_written_blocks = any(slot // block_size * block_size < tokens for slot in written)
        return tokens <= hit and whole_blocks and not in_written_blocks and not observed & set(range(tokens))

    first_block = first_kept_block(prompt_len, budget, block_size)
    allowed = cacheable_hit(hit, prompt_len, first_block, window, block_size)
    assert allowed == max(tokens for tokens in range(max(hit, 0) + 1) if safe(tokens))


@pytest.mark.parametrize(
    ("hit", "prompt_len", "first_block", "window", "expected"),
    [
        (960, 1000, 27, 32, 864),  # the written blocks bind
        (960, 1000, 30, 64, 928),  # the window binds (936 tokens, whole blocks)
        (960, 1000, 30, 41, 928),  # 959: one token short of a block
        (96, 1000, 27, 32, 96),  # the hit binds
        (100, 1000, 27, 32, 96),
        (960, 20, 0, 20, 0),
        (0, 1000, 27, 32, 0),
        (960, 20, 5, 32, 0),  # never below zero
    ],
)
def test_hit_by_hand(hit: int, prompt_len: int, first_block: int, window: int, expected: int) -> None:
    assert cacheable_hit(hit, prompt_len, first_block, window, block_size=32) == expected
