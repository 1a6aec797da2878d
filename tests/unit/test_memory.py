"""What is promised to vLLM's memory accounting is what is allocated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from vllm_calidrop.algorithm.placement import first_kept_block, view_start
from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.memory import (
    SWAP_OF_FREE_HOST,
    SWAP_PER_KV,
    Footprint,
    ModelShape,
    PoolSizes,
    buffer_page_bytes,
    default_swap_bytes,
    densest_block,
    footprint,
    sketch_block_bytes,
    swap_block_bytes,
    swap_bytes_beside,
)
from vllm_calidrop.ops.base import ModelKV, OperatorSet
from vllm_calidrop.ops.cpp import CppSet
from vllm_calidrop.ops.packed import PackedCache
from vllm_calidrop.ops.reference import ReferenceSet
from vllm_calidrop.records import RecallRecord, SequenceRecord
from vllm_calidrop.scheduler.build import size_pools
from vllm_calidrop.scheduler.spec import CaliDropSpec
from vllm_calidrop.settings.server import RESTS, ServerSettings
from vllm_calidrop.worker.compaction import compact, observe_chunk
from vllm_calidrop.worker.prefill import PrefillRow
from vllm_calidrop.worker.room import leave_room
from vllm_calidrop.worker.sequences import Sequence
from vllm_calidrop.worker.state_table import StateTable
from vllm_calidrop.worker.worker import CaliDropWorker

GIB = 2**30
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def make_shape(layers: int = 2, kv_heads: int = 2, group: int = 2, head_dim: int = 64, **other: Any) -> ModelShape:
    fields: dict[str, Any] = {"dtype": torch.float32, "max_model_len": 1024}
    return ModelShape(
        num_layers=layers, num_query_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, **fields | other
    )


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# persistent buffers


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 80]), DTYPES, st.integers(1, 9))
def test_state_table_is_counted_to_the_byte(
    layers: int, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, slots: int
) -> None:
    table = StateTable(layers, slots, kv_heads, group, head_dim, dtype)
    shape = make_shape(layers, kv_heads, group, head_dim, dtype=dtype)
    allocated = bytes_of(*(value for value in vars(table).values() if isinstance(value, torch.Tensor)))
    assert footprint(shape, slots, ServerSettings()).state_table == allocated


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([8, 80]), DTYPES, st.integers(0, 5))
def test_swap_pool_is_counted_to_the_byte(
    layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, blocks: int
) -> None:
    pool = SwapPool(layers, blocks, kv_heads, head_dim, dtype)
    shape = make_shape(layers, kv_heads, head_dim=head_dim, dtype=dtype)
    assert blocks * swap_block_bytes(shape) == bytes_of(pool.memory)


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([8, 80, 128]), DTYPES, st.integers(0, 5))
def test_recall_is_counted_to_the_byte(
    layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, count: int
) -> None:
    shape = make_shape(layers, kv_heads, head_dim=head_dim, dtype=dtype)
    for rest in RESTS:
        settings = ServerSettings(sketch_rest=rest)
        store = RecallStore(layers, 7, count, 2 * count, kv_heads, head_dim, dtype, rest)
        coded = (store.codes, store.scales, store.value_codes, store.value_scales)
        assert count * sketch_block_bytes(shape, settings) == bytes_of(*coded)
        assert 2 * count * buffer_page_bytes(shape) == bytes_of(store.buffer, store.held, store.rank)
        vectors = (store.mu, store.value_mu, store.balance)
        assert footprint(shape, 7, settings).recall == bytes_of(*vectors, store.looked)


def test_footprint_is_the_sum_of_its_parts() -> None:
    settings = ServerSettings(prefill_state_bytes=12345)
    ours = footprint(make_shape(), 7, settings)
    assert ours.prefill_state == 12345
    assert ours.total == ours.state_table + ours.recall + 12345 + ours.scratch
    assert Footprint(1, 20, 300, 4000).total == 4321


# what a compaction really takes


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most


def test_peak_of_is_the_most_at_once() -> None:
    def work() -> None:
        first, second = torch.empty(1000), torch.empty(1000)
        del first
        torch.empty(500)
        del second

    assert peak_of(work) == 8000


def one_prompt(
    shape: ModelShape, policy: str, budget: int, window: int, by_pages: bool
) -> tuple[PrefillRow, PackedCache]:
    """A prompt as long as the model allows, prefilled but for its last chunk (which is the whole)."""
    length, block_size = shape.max_model_len, 32
    blocks = -(-length // block_size)
    swap_blocks = tuple(range(swap_blocks_for(length - budget)))
    record = SequenceRecord(
        request_id="r", admission=1, slot=0, prompt_len=length, compaction_point=length, budget=budget,
        first_block=first_kept_block(length, budget, block_size), view_start=view_start(length, budget, block_size),
        policy=policy, window=window, sinks=4, pool_kernel=5, theta1=0.7, theta2=0.85, gate=0,
        stored=length - budget, swap_blocks=swap_blocks,
        recall=RecallRecord(0.9, 0.02, None, 4, swap_blocks, ()) if by_pages else None,
    )  # fmt: skip
    kv_cache = torch.randn((blocks, shape.num_kv_heads, block_size, 2 * shape.head_dim)).to(shape.dtype)
    row = PrefillRow(Sequence(record), 0, 0, length, torch.arange(blocks, dtype=torch.int32), True)
    return row, PackedCache(kv_cache, "vec")


def share_taken(operators: type[OperatorSet], shape: ModelShape, budget: int, by_pages: bool, policy: str) -> float:
    """What scoring and compacting the longest prompt takes of what is promised for it."""
    row, cache = one_prompt(shape, policy, budget, budget, by_pages)
    group, blocks = shape.num_query_heads // shape.num_kv_heads, swap_blocks_for(shape.max_model_len)
    pool = SwapPool(1, blocks, shape.num_kv_heads, shape.head_dim, shape.dtype)
    model = ModelKV(shape.dtype, shape.num_kv_heads, group, shape.head_dim, 32, "vec")
    worker = CaliDropWorker(
        SimpleNamespace(), ["a"], shape, 1, PoolSizes(blocks, blocks, 0), 1, torch.device("cpu"), pool, operators, model
    )
    queries = torch.randn((shape.max_model_len, shape.num_query_heads, shape.head_dim)).to(shape.dtype)
    scale = shape.head_dim**-0.5

    def work() -> None:
        observe_chunk(row, 0, queries, cache, worker.operators, scale)
        compact(row, 0, queries[-1], cache, worker, scale)

    stash = POLICIES[policy].prefill_bytes(replace(shape, num_layers=1), budget, shape.max_model_len)
    return peak_of(work) / (footprint(shape, 1, ServerSettings()).scratch + stash)


@pytest.mark.parametrize("by_pages", [False, True])
@pytest.mark.parametrize(
    ("shape", "budget"),
    [
        (make_shape(max_model_len=4096), 64),
        (make_shape(max_model_len=4096), 4000),
        (make_shape(max_model_len=4096, dtype=torch.bfloat16), 64),
        (make_shape(max_model_len=4096, kv_heads=1, group=8), 64),
        (make_shape(max_model_len=4096, kv_heads=8, group=1, dtype=torch.bfloat16), 64),
        (make_shape(max_model_len=2048), 1500),
    ],
    ids=str,
)
def test_compaction_stays_inside_the_promised_scratch(shape: ModelShape, budget: int, by_pages: bool) -> None:
    """With every policy, compiled and in torch; the promise is for the one of them that takes most.

    The observation window is the whole budget: a request may ask for that.
    """
    shares = [
        share_taken(operators, shape, budget, by_pages, policy)
        for operators, policy in itertools.product((CppSet, ReferenceSet), POLICIES)
    ]
    assert 0.1 < max(shares) <= 1, shares


# who gets how much


@given(st.integers(0, 64 * GIB), st.integers(0, 64 * GIB))
def test_default_swap_pool(kv_pool: int, free_host: int) -> None:
    swap = default_swap_bytes(kv_pool, free_host)
    assert swap <= SWAP_PER_KV * kv_pool and swap <= SWAP_OF_FREE_HOST * free_host
    assert swap in (int(SWAP_PER_KV * kv_pool), int(SWAP_OF_FREE_HOST * free_host))


@given(st.integers(0, 64 * GIB), st.integers(0, 64 * GIB))
def test_swap_pool_beside_the_kv_pool(available: int, free_host: int) -> None:
    """Where both come from the same memory, the rule of `default_swap_bytes` holds for what is left to the KV pool."""
    swap = swap_bytes_beside(available, free_host, ServerSettings())
    kv_pool = available - swap
    assert kv_pool >= 0
    assert swap <= SWAP_PER_KV * kv_pool + SWAP_PER_KV + 1
    assert abs(swap - default_swap_bytes(kv_pool, free_host)) <= SWAP_PER_KV + 1 or swap < SWAP_PER_KV * kv_pool
    assert swap_bytes_beside(available, free_host, ServerSettings(swap_bytes=77)) == 77


class Engine:
    """What `leave_room` and `size_pools` read of vLLM: a configuration, a worker, a KV-cache configuration."""

    SPEC = CaliDropSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    LAYERS = ("a", "b", "c")

    def __init__(
        self, fixed_kv_pool: int | None = None, tensor_parallel: int = 1, blocks: int | None = None, **calidrop: Any
    ) -> None:
        self.config = SimpleNamespace(
            additional_config={"calidrop": {"sketch_bytes": 0, "buffer_bytes": 0} | calidrop},
            cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed_kv_pool, num_gpu_blocks_override=blocks),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
            max_concurrent_batches=2,
            parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel),
            model_config=SimpleNamespace(max_model_len=2048, get_num_attention_heads=lambda parallel: 8),
        )
        runner = SimpleNamespace(get_kv_cache_spec=lambda: dict.fromkeys(self.LAYERS, self.SPEC))
        self.worker = SimpleNamespace(vllm_config=self.config, model_runner=runner)

    @property
    def shape(self) -> ModelShape:
        return make_shape(layers=3, group=4, max_model_len=2048)

    @property
    def ours(self) -> int:
        settings = ServerSettings.from_additional_config(self.config.additional_config)
        return footprint(self.shape, 32, settings).total

    def kv_cache_config(self, num_blocks: int, *specs: Any) -> Any:
        groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=self.LAYERS) for spec in specs or (self.SPEC,)]
        return SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(free: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))

    return set_to


def test_a_number_of_blocks_fixes_the_pool(free_memory: Callable[[int], None]) -> None:
    """What vLLM found is no matter then: the blocks are held against the free memory, with all of ours."""
    engine = Engine(blocks=100, swap_bytes=GIB)
    needed = 100 * 3 * Engine.SPEC.page_size_bytes + engine.ours + GIB
    free_memory(needed)
    assert leave_room(engine.config, engine.worker, 7) == 7
    free_memory(needed - 1)
    with pytest.raises(ValueError, match=r"lower --num-gpu-blocks-override .*swap_bytes"):
        leave_room(engine.config, engine.worker, 7)


def test_kv_pool_gets_what_is_left(free_memory: Callable[[int], None]) -> None:
    free_memory(100 * GIB)
    engine = Engine()
    rest = 10 * GIB - engine.ours
    left = leave_room(engine.config, engine.worker, 10 * GIB)
    assert abs(left - rest / 3) < 4, "two thirds go to the swap pool"
    free_memory(4 * GIB)
    assert leave_room(engine.config, engine.worker, 10 * GIB) == rest - 2 * GIB
    engine = Engine(swap_bytes=GIB)
    assert leave_room(engine.config, engine.worker, 10 * GIB) == rest - GIB


def test_nothing_left_for_the_kv_pool(free_memory: Callable[[int], None]) -> None:
    free_memory(100 * GIB)
    engine = Engine(swap_bytes=GIB)
    enough = engine.ours + GIB
    assert leave_room(engine.config, engine.worker, enough + 1) == 1
    for available in (enough, enough - 1, 1, 0):
        with pytest.raises(ValueError, match=r"nothing of the available .* swap_bytes"):
            leave_room(engine.config, engine.worker, available)


@pytest.mark.parametrize("swap", [0, GIB])
def test_a_fixed_kv_pool_is_checked_not_shrunk(free_memory: Callable[[int], None], swap: int) -> None:
    engine = Engine(fixed_kv_pool=3 * GIB, swap_bytes=swap)
    free_memory(3 * GIB + engine.ours + swap)
    assert leave_room(engine.config, engine.worker, 3 * GIB) == 3 * GIB
    free_memory(3 * GIB + engine.ours + swap - 1)
    with pytest.raises(ValueError, match=r"fixed KV pool \(3\.00 GiB\).*swap_bytes"):
        leave_room(engine.config, engine.worker, 3 * GIB)


def test_recall_comes_out_of_the_kv_pool(free_memory: Callable[[int], None]) -> None:
    """By default in proportion to the KV pool; what the operator gives is taken as it is."""
    free_memory(100 * GIB)
    without = Engine(swap_bytes=0)
    rest = 10 * GIB - without.ours
    given = Engine(swap_bytes=0, sketch_bytes=GIB, buffer_bytes=GIB)
    shape, block, page = given.shape, sketch_block_bytes(given.shape, ServerSettings()), buffer_page_bytes(given.shape)
    blocks, pages = GIB // block, GIB // page
    assert leave_room(given.config, given.worker, 10 * GIB) == rest - blocks * block - pages * page
    assert size_pools(given.config, given.kv_cache_config(1000)) == PoolSizes(0, blocks, pages, "v2")
    default = Engine(sketch_bytes=None, buffer_bytes=None)
    config = default.kv_cache_config(1000)
    kv_pool = 1000 * 32 * 2 * 2 * 64 * 4 * 3
    pools = size_pools(default.config, config)
    assert pools.sketch_blocks == kv_pool // 8 // block
    assert pools.buffer_pages == min(kv_pool // 32 // page, 32 * 4)
    assert leave_room(default.config, default.worker, 10 * GIB) < rest / 3
    few = Engine(sketch_bytes=None, swap_bytes=3 * swap_block_bytes(shape))
    most = swap_blocks_for(3 * densest_block(shape))
    assert kv_pool // 8 // block > most > 3
    assert size_pools(few.config, config) == PoolSizes(3, most, 0, "v2")


def test_swap_pool_in_whole_blocks(free_memory: Callable[[int], None]) -> None:
    free_memory(100 * GIB)
    block = swap_block_bytes(make_shape(layers=3))
    assert block == 3 * 2 * SWAP_BLOCK_TOKENS * 2 * 64 * 4
    for swap, blocks in [(0, 0), (block - 1, 0), (block, 1), (10 * block - 1, 9)]:
        engine = Engine(swap_bytes=swap)
        assert size_pools(engine.config, engine.kv_cache_config(1000)) == PoolSizes(blocks, 0, 0, "v2")


def test_swap_pool_by_default(free_memory: Callable[[int], None]) -> None:
    """Twice the KV pool; half of the free host memory, shared by the ranks of this host, if that is less."""
    kv_pool = 1000 * 32 * 2 * 2 * 64 * 4 * 3
    block = swap_block_bytes(make_shape(layers=3))
    free_memory(100 * GIB)
    assert size_pools(Engine().config, Engine().kv_cache_config(1000)).swap_blocks == 2 * kv_pool // block
    free_memory(2 * kv_pool)
    assert size_pools(Engine().config, Engine().kv_cache_config(1000)).swap_blocks == kv_pool // block
    two_ranks = Engine(tensor_parallel=2)
    assert size_pools(two_ranks.config, two_ranks.kv_cache_config(1000)).swap_blocks == kv_pool // 2 // block


def test_swap_pool_that_cannot_fit(free_memory: Callable[[int], None]) -> None:
    free_memory(GIB)
    for engine in (Engine(swap_bytes=GIB + 1), Engine(swap_bytes=GIB // 2 + 1, tensor_parallel=2)):
        with pytest.raises(ValueError, match=r"swap_bytes .* more than the free host memory"):
            size_pools(engine.config, engine.kv_cache_config(1000))
