"""How much memory this backend takes, counted in one function, and how much of it goes to the swap pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_calidrop.algorithm.policies import POLICIES, Needs
from vllm_calidrop.algorithm.policies.h2o import QUERY_TILE
from vllm_calidrop.algorithm.shape import KVShape
from vllm_calidrop.evicted.codecs import CODECS, codec_of
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.sketch import padded_dim
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.records import COUNTERS
from vllm_calidrop.settings.request import DEFAULT_PAGES
from vllm_calidrop.settings.server import ServerSettings

# Without --additional-config: the swap pool is at most twice the KV pool and at most this part of free host memory.
SWAP_PER_KV = 2
SWAP_OF_FREE_HOST = 0.5
# And of recall by pages, on the device: sketches and page buffers, as parts of the KV pool.
SKETCH_PER_KV = {"none": 1 / 16, "v1": 3 / 32, "v2": 1 / 8}  # by sketch_rest
BUFFER_PER_KV = 1 / 32


@dataclass(frozen=True)
class ModelShape(KVShape):
    """One rank's share of the model, and the longest sequence that it serves."""

    max_model_len: int

    @classmethod
    def of(cls, vllm_config: Any, spec: Any, num_layers: int) -> ModelShape:
        """From vLLM's configuration and the KV-cache spec that all of the model's layers share."""
        model = vllm_config.model_config
        return cls(
            num_layers=num_layers,
            num_query_heads=model.get_num_attention_heads(vllm_config.parallel_config),
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=spec.dtype,
            max_model_len=model.max_model_len,
        )

    @classmethod
    def of_groups(cls, vllm_config: Any, kv_cache_config: Any) -> ModelShape:
        """From vLLM's configuration and its KV-cache configuration, which has one group of layers (support.py)."""
        (group,) = kv_cache_config.kv_cache_groups
        return cls.of(vllm_config, group.kv_cache_spec, len(group.layer_names))


def num_state_slots(vllm_config: Any) -> int:
    """Slots of the state table: one waits until no step in flight can touch it, so every concurrent batch may hold a
    full set."""
    return int(vllm_config.scheduler_config.max_num_seqs * vllm_config.max_concurrent_batches)


@dataclass(frozen=True)
class PoolSizes:
    """So much of each pool of one rank: swap blocks on the host; sketch blocks and buffer pages (recall) on the device.

    Of a whole pool, of what is free, or of what one sequence needs. sketch_rest: of whole pools, the richest
    `kv_recall_rest` whose coded values the sketch blocks have room for.
    """

    swap_blocks: int
    sketch_blocks: int
    buffer_pages: int
    sketch_rest: str = "none"

    def fit_into(self, others: PoolSizes) -> bool:
        return (
            self.swap_blocks <= others.swap_blocks
            and self.sketch_blocks <= others.sketch_blocks
            and self.buffer_pages <= others.buffer_pages
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the KV pool and the pools of PoolSizes, on one rank. recall: means and flags of recall by pages."""

    state_table: int
    recall: int
    prefill_state: int
    scratch: int

    @property
    def total(self) -> int:
        return self.state_table + self.recall + self.prefill_state + self.scratch


def footprint(shape: ModelShape, num_slots: int, settings: ServerSettings) -> Footprint:
    """State table, stashes of prompts in prefill (bounded by a setting), and the scratch of the largest compaction."""
    slot = state_slot_bytes(shape)
    tokens, item = shape.max_model_len, shape.dtype.itemsize
    # K and V of the whole prompt as read, again in fp32, the evicted and kept copies, the padded run for the pool.
    kv = shape.num_kv_heads * tokens * 2 * shape.head_dim * (3 * item + 4)
    # Logits and their softmax for one tile of queries.
    scores = 2 * shape.num_query_heads * QUERY_TILE * tokens * 4
    encode = encode_bytes(shape)
    # The evicted keys centred, rotated, normalised and as magnitudes, in fp32, when they are sketched; of values also
    # the codes of each channel and the words they are put together to, as int64.
    per_channel = 4 * 4 + (3 * 8 if settings.sketch_rest != "none" else 0)
    sketch = shape.num_kv_heads * tokens * padded_dim(shape.head_dim) * per_channel
    recall = num_slots * RecallStore.slot_bytes(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, settings.sketch_rest
    )
    return Footprint(num_slots * slot, recall, settings.prefill_state_bytes, kv + scores + sketch + encode)


def state_slot_bytes(shape: KVShape) -> int:
    """One slot of the state table over all layers: query, output and log-sum-exp of every query head, and counters."""
    per_head = shape.head_dim * shape.dtype.itemsize + shape.head_dim * 4 + 4
    return shape.num_layers * (shape.num_query_heads * per_head + len(COUNTERS) * 8)


def encode_bytes(shape: ModelShape) -> int:
    """A swap block of tokens of the densest codec, K and V, in fp32 while it is encoded: six copies at once."""
    return shape.num_kv_heads * densest_block(shape) * 2 * shape.head_dim * 4 * 6


def prompt_key_bytes(shape: ModelShape) -> int:
    """The longest prompt's keys in one layer, where a registered policy looks at them."""
    looked_at = any(Needs.KEYS in policy.needs for policy in POLICIES.values())
    return looked_at * shape.num_kv_heads * shape.max_model_len * shape.head_dim * shape.dtype.itemsize


def densest_block(shape: ModelShape) -> int:
    """Most tokens that a swap block can hold."""
    return max(codec_of(name, shape.head_dim, shape.dtype).tokens_per_block for name in CODECS)


def swap_block_bytes(shape: ModelShape) -> int:
    return SwapPool.block_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype)


def sketch_block_bytes(shape: ModelShape, settings: ServerSettings) -> int:
    return RecallStore.sketch_block_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim, settings.sketch_rest)


def buffer_page_bytes(shape: ModelShape) -> int:
    return RecallStore.buffer_page_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype)


def recall_pools(
    kv_pool_bytes: int, swap_blocks: int | None, shape: ModelShape, num_slots: int, settings: ServerSettings
) -> tuple[int, int]:
    """Sketch blocks and buffer pages: what the operator gave, else a part of the KV pool and at most what can be used.

    swap_blocks: the swap pool's, None while they are not known.
    """
    sketch = settings.sketch_bytes
    if sketch is None:
        sketch = int(SKETCH_PER_KV[settings.sketch_rest] * kv_pool_bytes)
        if swap_blocks is not None:
            most = swap_blocks_for(swap_blocks * densest_block(shape))
            sketch = min(sketch, most * sketch_block_bytes(shape, settings))
    buffer = settings.buffer_bytes
    if buffer is None:
        buffer = min(int(BUFFER_PER_KV * kv_pool_bytes), num_slots * DEFAULT_PAGES * buffer_page_bytes(shape))
    return sketch // sketch_block_bytes(shape, settings), buffer // buffer_page_bytes(shape)


def recall_pool_bytes(pools: tuple[int, int], shape: ModelShape, settings: ServerSettings) -> int:
    return pools[0] * sketch_block_bytes(shape, settings) + pools[1] * buffer_page_bytes(shape)


def default_swap_bytes(kv_pool_bytes: int, free_host_bytes: int) -> int:
    return int(min(SWAP_PER_KV * kv_pool_bytes, SWAP_OF_FREE_HOST * free_host_bytes))


def swap_bytes_beside(available: int, free_host_bytes: int, settings: ServerSettings) -> int:
    """The swap pool's share of `available` bytes that KV pool and swap pool take from the same host memory (CPU)."""
    if settings.swap_bytes is not None:
        return settings.swap_bytes
    return int(min(available * SWAP_PER_KV / (1 + SWAP_PER_KV), SWAP_OF_FREE_HOST * free_host_bytes))
