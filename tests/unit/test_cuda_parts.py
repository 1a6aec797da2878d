"""The CUDA backend's parts over CPU tensors: cache by tokens, packing for the host pool, what it refuses."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_calidrop.attention.cuda import host_pool
from vllm_calidrop.attention.cuda.backend import CaliDropCudaBackend
from vllm_calidrop.attention.cuda.host_pool import PinnedSwapPool, runs, staging_bytes
from vllm_calidrop.attention.cuda.plain_cache import PlainCache
from vllm_calidrop.attention.cuda.worker import CaliDropCudaWorker
from vllm_calidrop.cache.layout import SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.memory import ModelShape, PoolSizes
from vllm_calidrop.settings import RequestSettings, SettingsError
from vllm_calidrop.support import refuse_settings

CPU = torch.device("cpu")


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
    assert staging_bytes(12, heads, head_dim, torch.float32) == 2 * (2 * block + 4)
    block_ids = (7, 8, 2, 11, 3, 4, 9)[: swap_blocks_for(tokens)]
    kv = torch.randn(2, heads, tokens, head_dim)
    for part in pool.parts(block_ids, tokens):
        flat = torch.zeros(2, heads, len(part.ids) * SWAP_BLOCK_TOKENS, head_dim)
        flat[:, :, : part.tokens.stop - part.tokens.start] = kv[:, :, part.tokens]
        paged = flat.unflatten(2, (len(part.ids), part.staging.shape[2], -1))
        part.staging.copy_(paged.permute(2, 1, 3, 0, 4, 5))
        pool.send(layer, part)
    pool.join()
    assert pool.device_pages is pool.pages
    for head in range(heads):
        keys, values = pool.read(layer, torch.tensor([block_ids]), torch.tensor([head]))
        assert torch.equal(keys[0, :tokens], kv[0, head]) and torch.equal(values[0, :tokens], kv[1, head])
    pool.close()


def test_worker_is_counted_to_the_byte() -> None:
    shape = ModelShape(3, 8, 2, 64, torch.float32, 1000)
    worker = CaliDropCudaWorker(SimpleNamespace(), ["a", "b", "c"], shape, 12, PoolSizes(4, 0, 0), CPU, 5)
    held = [worker.step.table, worker.slots._device, worker.slots.sequences.swap_blocks, *worker._scratch]
    assert sum(tensor.nbytes for tensor in held) == CaliDropCudaWorker.num_bytes(shape, 12, 5)
    staged = worker.pool._staging.nbytes + worker.pool._ids.nbytes
    assert staged == staging_bytes(4, 2, 64, torch.float32)


@pytest.mark.parametrize("token_major", [True, False])
def test_cache_by_tokens(token_major: bool) -> None:
    """Either layout: what is written at positions is read there, other blocks and slots stay as they were."""
    heads, head_dim, block_size = 2, 8, 16
    cache = torch.full((6, heads, block_size, 2 * head_dim), torch.nan)
    if token_major:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    plain = PlainCache(cache)
    table = torch.tensor([5, 1, 3], dtype=torch.int32)
    keys, values = torch.randn(heads, 20, head_dim), torch.randn(heads, 20, head_dim)
    plain.write(keys, values, table, 10)
    read_keys, read_values = plain.read(table, 30)
    assert torch.equal(read_keys[:, 10:], keys) and torch.equal(read_values[:, 10:], values)
    assert read_keys[:, :10].isnan().all() and cache[[0, 2, 4]].isnan().all() and cache[3].isnan().all()
    views = plain.views
    assert torch.equal(views.key[1, 0, 0], keys[0, 6]) and torch.equal(views.value[5, 1, 15], values[1, 5])


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
    pages = RequestSettings(kv_budget=64, kv_recall="pages")
    refuse_settings(pages)
    monkeypatch.setattr("vllm_calidrop.flavour.uses_cuda_flavour", lambda: True)
    with pytest.raises(SettingsError, match=r"kv_recall \(pages\) is not supported on CUDA") as refusal:
        refuse_settings(pages)
    assert refusal.value.field == "kv_recall"
    for fine in (
        {"kv_budget": 64},
        {"kv_recall": "pages"},
        {"kv_budget": 9, "kv_recall": "pages", "kv_policy": "full"},
    ):
        refuse_settings(RequestSettings(**fine))
