"""How much device and host memory a model, context, budget and concurrency take; plan_command.py prints it.

Every size comes from the functions that the engine itself uses (vllm_calidrop/memory.py), per tensor-parallel rank.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal

from vllm_calidrop.algorithm.shape import KVShape
from vllm_calidrop.memory import (
    ModelShape,
    PoolSizes,
    buffer_page_bytes,
    footprint,
    recall_pool_bytes,
    recall_pools,
    sketch_block_bytes,
    state_slot_bytes,
    swap_block_bytes,
)
from vllm_calidrop.scheduler.admission import decide
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings

Device = Literal["gpu", "cpu"]

# Pools that hold whatever a sequence needs: a plan asks what that is.
ROOM = PoolSizes(sys.maxsize, sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class Workload:
    """What is to be served. context and output: tokens of every request's prompt and answer, the largest expected."""

    context: int
    output: int
    concurrency: int
    block_size: int
    settings: RequestSettings


@dataclass(frozen=True)
class PerSequence:
    """One sequence at its last token. Blocks are vLLM's KV blocks; a swap block holds 128 evicted tokens, or more of a
    codec; a sketch block 128.
    """

    full_blocks: int
    prompt_blocks: int
    budget_blocks: int
    swap_blocks: int
    sketch_blocks: int
    buffer_pages: int

    @classmethod
    def of(cls, load: Workload, shape: ModelShape) -> PerSequence:
        kv = {field.name: getattr(shape, field.name) for field in dataclasses.fields(KVShape)}
        decision = decide(load.settings, load.context, Shape(**kv, block_size=load.block_size), ROOM, ROOM)
        full = -(-(load.context + load.output) // load.block_size)
        return cls(
            full_blocks=full,
            prompt_blocks=-(-load.context // load.block_size),
            budget_blocks=full - decision.first_block,
            swap_blocks=decision.needs.swap_blocks,
            sketch_blocks=decision.needs.sketch_blocks,
            buffer_pages=decision.needs.buffer_pages,
        )


def beside_the_pools(
    shape: ModelShape, device: Device, max_num_seqs: int, num_slots: int, max_batched: int, settings: ServerSettings
) -> dict[str, int]:
    """Bytes that this backend takes beside the KV pool and the pools of a Plan, by what they are for."""
    if device == "cpu":
        return dataclasses.asdict(footprint(shape, num_slots, settings))
    from vllm_calidrop.worker.room import device_bytes

    state_table = num_slots * state_slot_bytes(shape)
    prefill_state = settings.prefill_state_bytes
    whole = device_bytes(shape, num_slots, max_num_seqs, max_batched, settings)
    scratch = whole - state_table - prefill_state
    return {"state_table": state_table, "prefill_state": prefill_state, "scratch": scratch}


def kv_block_bytes(shape: ModelShape, block_size: int) -> int:
    """One block of vLLM's KV pool: K and V of `block_size` tokens in every layer."""
    return shape.num_layers * block_size * shape.num_kv_heads * 2 * shape.head_dim * shape.dtype.itemsize


def fit_full(one: PerSequence, pool_blocks: int) -> int:
    """Sequences with full KV that the pool holds to their last token. One block of vLLM's pool is never given out."""
    return max(0, pool_blocks - 1) // one.full_blocks


def fit_budget(one: PerSequence, pool_blocks: int) -> int:
    """Sequences with the budget that run without a preemption: all compressed but one, whose prompt is still whole.

    One further block for every other sequence is the headroom that admission keeps while that prompt is prefilled.
    """
    free = pool_blocks - 1 - max(one.prompt_blocks, one.budget_blocks)
    growth = 1 if one.budget_blocks < one.full_blocks else 0
    return 0 if free < 0 else 1 + free // (one.budget_blocks + growth)


@dataclass(frozen=True)
class Plan:
    """Bytes per rank, and sequences. beside: by purpose, what is neither KV pool nor one of the pools here.

    needed_*: KV pool for the asked concurrency; fit_*: what `pool_blocks` holds.
    """

    shape: ModelShape
    load: Workload
    one: PerSequence
    block_bytes: int
    num_slots: int
    beside: dict[str, int]
    swap_bytes: int
    sketch_bytes: int
    sketch_block_bytes: int
    sketch_rest: str
    buffer_bytes: int
    needed_full: int
    needed_budget: int
    pool_blocks: int | None
    fit_full: int | None
    fit_budget: int | None

    def as_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        load = dataclasses.asdict(self.load) | {"settings": self.load.settings.to_record()}
        shape = dataclasses.asdict(self.shape) | {"dtype": str(self.shape.dtype).removeprefix("torch.")}
        return values | {"shape": shape, "load": load, "one": dataclasses.asdict(self.one)}

    @property
    def server_settings(self) -> dict[str, Any]:
        """What to put under `calidrop` in --additional-config so that nothing falls back at this concurrency."""
        return {
            "swap_bytes": self.swap_bytes,
            "sketch_bytes": self.sketch_bytes,
            "sketch_rest": self.sketch_rest,
            "buffer_bytes": self.buffer_bytes,
        }


def make_plan(
    shape: ModelShape,
    load: Workload,
    settings: ServerSettings,
    device: Device,
    max_num_seqs: int,
    concurrent_batches: int = 2,
    max_batched: int = 8192,
    kv_memory: int | None = None,
    kv_pool: int | None = None,
) -> Plan:
    """concurrent_batches: 2 with vLLM's asynchronous scheduling, its default. kv_memory: bytes that vLLM finds for its
    KV pool, out of which this backend takes its own (on CPU the swap pool too); kv_pool: bytes of a KV pool of fixed
    size, which stays whole. max_batched: --max-num-batched-tokens.
    """
    one = PerSequence.of(load, shape)
    if device == "gpu" and one.sketch_blocks:
        raise SettingsError(
            "kv_recall: recall by pages is refused on a GPU (docs/gpu.md); say --device cpu", "kv_recall"
        )
    if "sketch_rest" not in settings.model_fields_set:  # room for what these requests ask for
        settings = settings.model_copy(update={"sketch_rest": load.settings.kv_recall_rest})
    num_slots = max_num_seqs * concurrent_batches
    block = kv_block_bytes(shape, load.block_size)
    # One sequence more than run: an ended one's ids rest until the steps in flight are done.
    count = load.concurrency + 1 if one.swap_blocks else 0
    swap = _or(settings.swap_bytes, count * one.swap_blocks * swap_block_bytes(shape))
    sketch = _or(settings.sketch_bytes, count * one.sketch_blocks * sketch_block_bytes(shape, settings))
    buffer = _or(settings.buffer_bytes, count * one.buffer_pages * buffer_page_bytes(shape))
    given = settings.model_copy(update={"swap_bytes": swap, "sketch_bytes": sketch, "buffer_bytes": buffer})
    beside = beside_the_pools(shape, device, max_num_seqs, num_slots, max_batched, given)
    pool_blocks = None if kv_pool is None else kv_pool // block
    if kv_memory is not None:
        left = kv_memory - sum(beside.values())
        if device == "cpu":
            left -= swap + recall_pool_bytes(recall_pools(0, None, shape, num_slots, given), shape, given)
        pool_blocks = max(0, left) // block
    others = load.concurrency - 1
    growth = 1 if one.budget_blocks < one.full_blocks else 0
    needed = max(one.prompt_blocks, one.budget_blocks) + others * (one.budget_blocks + growth)
    return Plan(
        shape=shape,
        load=load,
        one=one,
        block_bytes=block,
        num_slots=num_slots,
        beside=beside,
        swap_bytes=swap,
        sketch_bytes=sketch,
        sketch_block_bytes=sketch_block_bytes(shape, settings),
        sketch_rest=settings.sketch_rest,
        buffer_bytes=buffer,
        needed_full=(load.concurrency * one.full_blocks + 1) * block,
        needed_budget=(needed + 1) * block,
        pool_blocks=pool_blocks,
        fit_full=None if pool_blocks is None else fit_full(one, pool_blocks),
        fit_budget=None if pool_blocks is None else fit_budget(one, pool_blocks),
    )


def _or(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given
