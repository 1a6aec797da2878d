"""The CUDA backend's parts over CPU tensors: cache by tokens, packing for the host pool, what it refuses."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from tests.support.workers import CPU, cuda_worker
from vllm_calidrop.attention.cuda import CaliDropCudaBackend
from vllm_calidrop.evicted import pinned_pool as host_pool
from vllm_calidrop.evicted.codecs import number_of
from vllm_calidrop.evicted.layout import PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pinned_pool import PinnedSwapPool, runs, staging_bytes
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.memory import ModelShape, state_slot_bytes
from vllm_calidrop.ops.registry import CHOICE_VARIABLE
from vllm_calidrop.ops.strided import StridedCache, kv_views
from vllm_calidrop.ops.triton.operators import TritonSet
from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings
from vllm_calidrop.support import refuse_settings
from vllm_calidrop.worker.room import RANKING_BYTES, compaction_bytes, device_bytes, leave_room_on_device
from vllm_calidrop.worker.worker import CaliDropWorker


@given(st.lists(st.integers(0, 20), unique=True, max_size=12).map(tuple))
def test_consecutive_blocks_are_one_copy(block_ids: tuple[int, ...]) -> None:
    copies = list(runs(block_ids))
    assert [first + i for _, first, count in copies for i in range(count)] == list(block_ids)
    assert [at for at, *_ in copies] == [sum(count for *_, count in copies[:n]) for n in range(len(copies))]
    assert all(first + count != later for (_, first, count), (_, later, _) in itertools.pairwise(copies))


@pytest.mark.parametrize("tokens", [1, 128, 129, 700])
def test_evicted_kv_by_way_of_staging(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than a buffer holds, in ids that are not consecutive; read back through the pool's own reader."""
    heads, head_dim, layer = 2, 16, 1
    block = PinnedSwapPool.block_bytes(1, heads, head_dim, torch.float32)
    monkeypatch.setattr(host_pool, "STAGING_BYTES", 2 * block)
    pool = PinnedSwapPool(2, 12, heads, head_dim, torch.float32, CPU)
    assert staging_bytes(12, heads, head_dim, torch.float32) == pool._staging.nbytes == 2 * (2 * block)
    block_ids = (7, 8, 2, 11, 3, 4, 9)[: swap_blocks_for(tokens)]
    kv = torch.randn(2, heads, tokens, head_dim)
    for part in pool.parts(block_ids, tokens, pool.codecs[0]):
        ids = part.block_ids
        assert part.out.untyped_storage().data_ptr() == pool._staging.untyped_storage().data_ptr()
        flat = torch.zeros(2, heads, len(ids) * SWAP_BLOCK_TOKENS, head_dim)
        flat[:, :, : part.tokens.stop - part.tokens.start] = kv[:, :, part.tokens]
        paged = flat.unflatten(2, (len(ids), PAGES_PER_BLOCK, -1)).permute(2, 1, 3, 0, 4, 5)
        part.out.copy_(paged.flatten(2).contiguous().view(torch.uint8))
        pool.send(layer, part)
    pool.join()
    assert pool.device_pages is pool.pages
    for head in range(heads):
        keys, values = pool.read(layer, torch.tensor([block_ids]), torch.tensor([head]))
        assert torch.equal(keys[0, :tokens], kv[0, head]) and torch.equal(values[0, :tokens], kv[1, head])
    pool.close()


@pytest.mark.parametrize("name", ["int8", "int2"])
def test_encoded_kv_by_way_of_staging(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a codec's blocks, which hold more tokens; what is stored is what the pool's own writer stores."""
    heads, head_dim, tokens = 2, 32, 1500
    block = PinnedSwapPool.block_bytes(1, heads, head_dim, torch.float32)
    monkeypatch.setattr(host_pool, "STAGING_BYTES", 2 * block)
    pool = PinnedSwapPool(1, 12, heads, head_dim, torch.float32, CPU)
    plain = SwapPool(1, 12, heads, head_dim, torch.float32)
    codec = pool.codecs[number_of(name)]
    block_ids = (7, 8, 2, 11, 3, 4, 9)[: codec.blocks_for(tokens)]
    keys, values = torch.randn(2, heads, tokens, head_dim)
    plain.write(0, block_ids, keys, values, name)
    sent = []
    for part in pool.parts(block_ids, tokens, codec):
        encoded = codec.encode(keys[:, part.tokens], values[:, part.tokens])
        part.out.copy_(encoded.blocks.transpose(0, 1))
        pool.send(0, part)
        sent.append(part.tokens)
    assert sent[0].start == 0 and sent[-1].stop == tokens
    assert all(one.stop == other.start for one, other in itertools.pairwise(sent))
    assert torch.equal(pool.memory[0, list(block_ids)], plain.memory[0, list(block_ids)])
    pool.close()


class LateStream:
    """A stream whose work is done only when somebody waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.waits: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waits.append(other)

    def record_event(self) -> int:
        return len(self.queue)

    def run_until(self, event: int) -> None:
        for work in self.queue[:event]:
            work()
        self.queue[:event] = [lambda: None] * event


def test_copies_that_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is packed into a buffer before its copies are done, and nothing is read before all of them are."""
    heads, head_dim = 1, 16
    block = PinnedSwapPool.block_bytes(1, heads, head_dim, torch.float32)
    monkeypatch.setattr(host_pool, "STAGING_BYTES", 2 * block)
    pool, late = PinnedSwapPool(1, 12, heads, head_dim, torch.float32, CPU), LateStream()
    pool.pages.zero_()
    copy, compute = pool._copy, SimpleNamespace(wait_event=late.run_until)
    monkeypatch.setattr(pool, "_stream", late)
    monkeypatch.setattr(pool, "_copy", lambda *work: late.queue.append(lambda: copy(*work)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    for part in pool.parts(tuple(range(7)), 7 * SWAP_BLOCK_TOKENS, pool.codecs[0]):
        part.out.view(torch.float32).copy_(torch.tensor([1.0 + i for i in part.block_ids])[:, None, None])
        pool.send(0, part)
    assert late.waits == [compute] * 4, "a copy begins after what fills its buffer"
    written = [pool.pages[0, i].unique().tolist() for i in range(7)]
    assert written == [[1.0], [2.0], [3.0], [4.0], [0.0], [0.0], [0.0]], "two buffers are still on their way"
    pool.join()
    assert [pool.pages[0, i].unique().tolist() for i in range(7)] == [[1.0 + i] for i in range(7)]


def test_worker_is_counted_to_the_byte() -> None:
    shape = ModelShape(3, 8, 2, 64, torch.float32, 1000)
    worker = cuda_worker(shape, num_slots=12, swap_blocks=4, max_rows=5)
    sequences, recall = worker.slots.sequences, worker.slots.recall
    held = [worker.step.table, *worker.slots._device, sequences.swap_blocks, sequences.layouts]
    held += [recall.sketch_blocks, recall.buffer_ids]
    assert sum(tensor.nbytes for tensor in held) == CaliDropWorker.table_bytes(1000, 12, 5)
    operators, pool = worker.operators, worker.pool
    assert isinstance(operators, TritonSet) and isinstance(pool, PinnedSwapPool)
    assert sum(tensor.nbytes for tensor in operators._scratch) == TritonSet.scratch_bytes(operators.model, 5)
    assert pool._staging.nbytes == staging_bytes(4, 2, 64, torch.float32)
    state = [worker.table.query, worker.table.out, worker.table.lse, worker.table.counts]
    assert sum(tensor.nbytes for tensor in state) == 12 * state_slot_bytes(shape)


def test_kv_pool_leaves_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, settings = ModelShape(3, 8, 2, 64, torch.bfloat16, 1000), ServerSettings()
    monkeypatch.setenv(CHOICE_VARIABLE, "triton")
    ours = device_bytes(shape, 12, 5, 512, settings)
    assert ours > compaction_bytes(shape, 512) + settings.prefill_state_bytes
    longer = ModelShape(3, 8, 2, 64, torch.bfloat16, 2000)
    assert compaction_bytes(longer, 512) - compaction_bytes(shape, 512) == 2 * 1000 * (2 * 64 * 2 + RANKING_BYTES)

    def left(available: int, fixed: int | None = None) -> int:
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=5, max_num_batched_tokens=512),
            cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed),
        )
        return leave_room_on_device(shape, 12, settings, config, available, fixed)

    assert left(ours + 7) == 7
    with pytest.raises(ValueError, match="nothing of the available"):
        left(ours)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (ours + 100, 2**40))
    assert left(100, fixed=100) == 100
    with pytest.raises(ValueError, match="more than the free device memory"):
        left(101, fixed=101)


@pytest.mark.parametrize("token_major", [True, False])
def test_the_cache_in_either_layout(token_major: bool) -> None:
    cache = torch.arange(3 * 2 * 16 * 8).view(3, 2, 16, 8)
    if token_major:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = kv_views(cache)
    assert key.shape == value.shape == (3, 2, 16, 4)
    assert torch.equal(key, cache[..., :4]) and torch.equal(value, cache[..., 4:])
    assert key.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr(), "views, not copies"


@pytest.mark.parametrize("token_major", [True, False])
def test_the_cache_by_tokens(token_major: bool) -> None:
    """What was put at positions of a sequence is there, by positions of each KV head and by whole blocks; else NaN."""
    cache = torch.full((7, 2, 16, 8), torch.nan)
    if token_major:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    tokens, blocks = StridedCache(cache), torch.tensor([5, 0, 3, 6], dtype=torch.int32)
    keys, values = torch.randn((2, 2, 37, 4))
    tokens.put(blocks, 11, keys, values)
    index = torch.stack([torch.randperm(37)[:9].sort().values for _ in range(2)])
    taken = tokens.take(blocks, index + 11)
    for found, put in zip(taken, (keys, values), strict=True):
        assert torch.equal(found, put.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)))
    whole = tokens.read(blocks[None])
    for found, put in zip(whole, (keys, values), strict=True):
        assert (
            torch.equal(found[0, :, 11:48], put) and found[0, :, :11].isnan().all() and found[0, :, 48:].isnan().all()
        )
    assert cache[[1, 2, 4]].isnan().all()


def test_what_vllm_is_told() -> None:
    def reasons(**given: Any) -> list[str]:
        asked: dict[str, Any] = {
            "head_size": 128,
            "dtype": torch.bfloat16,
            "kv_cache_dtype": "auto",
            "block_size": 16,
            "use_mla": False,
            "has_sink": False,
            "use_sparse": False,
            "use_mm_prefix": False,
            "use_per_head_quant_scales": False,
            "device_capability": DeviceCapability(9, 0),
            "attn_type": "decoder",
        }
        return CaliDropCudaBackend.validate_configuration(**asked | given)

    assert reasons() == []
    assert reasons(device_capability=DeviceCapability(8, 0), dtype=torch.float16, block_size=48, head_size=96) == []
    refused: list[dict[str, Any]] = [
        {"head_size": 72},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "fp8"},
        {"block_size": 24},
        {"use_mla": True},
        {"has_sink": True},
        {"use_mm_prefix": True},
        {"device_capability": DeviceCapability(7, 5)},
        {"attn_type": "encoder_only"},
        {"has_sliding_window": True},
        {"use_rswa": True},
        {"use_non_causal": True},
        {"use_batch_invariant": True},
        {"use_kv_connector": True},
        {"use_adaptive_verification": True},
        {"use_dcp": True},
        {"use_pcp": True},
    ]
    for one in refused:
        assert len(reasons(**one)) == 1, one
    assert CaliDropCudaBackend.get_supported_kernel_block_sizes() == [MultipleOf(16)]
    assert CaliDropCudaBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)
    assert CaliDropCudaBackend.get_name() == "CALIDROP"


def test_requests_without_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = [{"kv_recall": "pages"}, {"kv_codec": "int8"}, {"kv_read_budget": 4096}]
    for names in asked:
        refuse_settings(RequestSettings(kv_budget=64, **names))
    monkeypatch.setattr("vllm_calidrop.ops.registry.uses_cuda_flavour", lambda: True)
    for op, serves, refused in (
        ("auto", "triton", asked[:1]), ("triton", "triton", asked[:1]), ("xformers", "xformers", asked),
        ("reference", "reference", []),
    ):  # fmt: skip
        monkeypatch.setenv(CHOICE_VARIABLE, op)
        for names in asked:
            (field,) = names
            if names in refused:
                reason = rf"{field} \(.*\) is not supported by the {serves} operators"
                with pytest.raises(SettingsError, match=reason) as no:
                    refuse_settings(RequestSettings(kv_budget=64, **names))
                assert no.value.field == field
            else:
                refuse_settings(RequestSettings(kv_budget=64, **names))
            for plain in ({}, {"kv_budget": 9, "kv_policy": "full"}, {"kv_budget": 9, "kv_calibration": False}):
                refuse_settings(RequestSettings(**plain, **names))
        refuse_settings(RequestSettings(kv_budget=64))
