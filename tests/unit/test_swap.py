"""The swap pool: nobody is given an id that somebody else holds, and what was written is what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from vllm_calidrop.evicted.codecs import CODECS, number_of
from vllm_calidrop.evicted.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.scheduler.ids import FreeList

LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4


class LedgerMachine(RuleBasedStateMachine):
    """Owners take and give back in any order; the free ones are always those nobody holds."""

    NUM_BLOCKS = 12
    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = FreeList(self.NUM_BLOCKS)
        self.held: list[int] = []

    @rule(target=owners, count=st.integers(0, NUM_BLOCKS + 2))
    def take(self, count: int) -> tuple[int, ...]:
        free = self.NUM_BLOCKS - len(self.held)
        taken = self.ledger.take(count)
        if count > free:
            assert taken is None
            return ()
        assert taken is not None and len(taken) == count
        self.held.extend(taken)
        return taken

    @rule(taken=consumes(owners))
    def give_back(self, taken: tuple[int, ...]) -> None:
        self.ledger.give_back(taken)
        for block_id in taken:
            self.held.remove(block_id)

    @invariant()
    def nobody_holds_what_another_holds(self) -> None:
        assert len(set(self.held)) == len(self.held)
        assert set(self.held) <= set(range(self.NUM_BLOCKS))
        assert self.ledger.num_free == self.NUM_BLOCKS - len(self.held)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestFreeList = LedgerMachine.TestCase


def test_a_pool_without_blocks() -> None:
    ledger = FreeList(0)
    assert ledger.take(0) == ()
    assert ledger.take(1) is None


def test_giving_back_twice_is_noticed() -> None:
    ledger = FreeList(2)
    taken = ledger.take(2)
    assert taken is not None
    ledger.give_back(taken)
    with pytest.raises(AssertionError):
        ledger.give_back(taken)


def random_kv(generator: torch.Generator, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn((2, KV_HEADS, tokens, HEAD_DIM), generator=generator).to(dtype)
    return keys, values


def make_pool(num_blocks: int, dtype: torch.dtype = torch.float32) -> SwapPool:
    pool = SwapPool(LAYERS, num_blocks, KV_HEADS, HEAD_DIM, dtype)
    pool.pages.fill_(float("nan"))  # never written yet: whatever lies there must not matter
    return pool


# 1, around the edges of a page, around the edges of a block, and anything.
LENGTHS = st.one_of(
    st.sampled_from([1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1]),
    st.builds(lambda blocks, off: blocks * SWAP_BLOCK_TOKENS + off, st.integers(1, 3), st.integers(-1, 1)),
    st.integers(1, 400),
)


@settings(max_examples=60)
@given(
    st.lists(LENGTHS, min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_written_is_read(lengths: list[int], random: Any, dtype: torch.dtype) -> None:
    """Sequences in scattered blocks, both layers; pairs of (sequence, KV head) read together, in any order."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    block_counts = [swap_blocks_for(tokens) for tokens in lengths]
    ids = list(range(sum(block_counts) + 2))
    random.shuffle(ids)
    blocks_of = []
    for count in block_counts:
        blocks_of.append([ids.pop() for _ in range(count)])
    pool = make_pool(sum(block_counts) + 2, dtype)
    written = {}
    for layer in range(LAYERS):
        for sequence, tokens in enumerate(lengths):
            kv = random_kv(generator, tokens, dtype)
            pool.write(layer, tuple(blocks_of[sequence]), *kv)
            written[layer, sequence] = kv

    pairs = [(sequence, kv_head) for sequence in range(len(lengths)) for kv_head in range(KV_HEADS)]
    random.shuffle(pairs)
    pairs = pairs[: random.randint(1, len(pairs))]
    width = max(block_counts[sequence] for sequence, _ in pairs)
    # A shorter row of the table goes on with zeros, as SequenceTable's does.
    table = torch.zeros((len(pairs), width), dtype=torch.int64)
    for row, (sequence, _) in enumerate(pairs):
        table[row, : block_counts[sequence]] = torch.tensor(blocks_of[sequence])
    for layer in range(LAYERS):
        keys, values = pool.read(layer, table, torch.tensor([kv_head for _, kv_head in pairs]))
        assert keys.shape == values.shape == (len(pairs), width * SWAP_BLOCK_TOKENS, HEAD_DIM)
        for row, (sequence, kv_head) in enumerate(pairs):
            expected_keys, expected_values = written[layer, sequence]
            assert torch.equal(keys[row, : lengths[sequence]], expected_keys[kv_head])
            assert torch.equal(values[row, : lengths[sequence]], expected_values[kv_head])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(CODECS)), st.integers(1, 700)), min_size=2, max_size=5), st.integers(0, 99)
)
def test_mixed_codecs_in_one_pool(runs: list[tuple[str, int]], seed: int) -> None:
    """Runs of different codecs in scattered blocks; each is what its codec makes of it, as if it were alone."""
    generator = torch.Generator().manual_seed(seed)
    pool = SwapPool(LAYERS, 60, KV_HEADS, 16, torch.bfloat16)
    pool.memory.random_(0, 256, generator=generator)
    ids = torch.randperm(60, generator=generator).tolist()
    written = []
    for name, tokens in runs:
        codec = pool.codecs[number_of(name)]
        blocks = torch.tensor([ids.pop() for _ in range(codec.blocks_for(tokens))])
        keys, values = torch.randn((2, KV_HEADS, tokens, 16), generator=generator).to(torch.bfloat16)
        assert not pool.write(1, tuple(blocks.tolist()), keys, values, name).any()
        written.append((codec, blocks, keys, values))
    for codec, blocks, keys, values in written:
        heads, tokens = torch.arange(KV_HEADS), keys.shape[1]
        read = pool.read(1, blocks.expand(KV_HEADS, -1), heads, number_of(codec.name))
        alone = codec.decode(codec.encode(keys, values).blocks.flatten(0, 1))
        for x, expected in zip(read, alone, strict=True):
            assert torch.equal(x[:, :tokens], expected.reshape(x.shape)[:, :tokens])
        page = (tokens - 1) // PAGE_TOKENS
        block, within = blocks[page // codec.pages_per_block].expand(KV_HEADS), page % codec.pages_per_block
        last = pool.read_pages(1, block, heads, torch.full((KV_HEADS,), within), number_of(codec.name))
        count = tokens - page * PAGE_TOKENS
        assert torch.equal(last[:, 0, :count], read[0][:, page * PAGE_TOKENS : tokens])
        assert torch.equal(last[:, 1, :count], read[1][:, page * PAGE_TOKENS : tokens])


def test_a_write_touches_its_own_blocks_and_layer_only() -> None:
    pool = make_pool(4)
    pool.pages.fill_(7.0)
    pool.write(1, (2, 0), *random_kv(torch.Generator().manual_seed(0), 130, torch.float32))
    assert (pool.pages[0] == 7).all()
    assert (pool.pages[1, [1, 3]] == 7).all()
    assert not (pool.pages[1, [0, 2]] == 7).any(), "what lies beyond the last token is zero, not what lay there before"


def test_a_page_of_a_head_is_one_run() -> None:
    """Recall will read 16-token pages of one KV head alone: K run, then V run, head_dim innermost."""
    pool = make_pool(3)
    keys, values = random_kv(torch.Generator().manual_seed(0), 200, torch.float32)
    pool.write(0, (2, 1), keys, values)
    page = pool.pages[0, 1, 2, 3]  # layer 0, second block, KV head 2, page 3: tokens 176 to 191
    assert page.is_contiguous()
    first = SWAP_BLOCK_TOKENS + 3 * PAGE_TOKENS
    assert torch.equal(page[0], keys[2, first : first + PAGE_TOKENS])
    assert torch.equal(page[1], values[2, first : first + PAGE_TOKENS])
