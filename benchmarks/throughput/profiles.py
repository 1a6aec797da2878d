"""What is measured: `quick` in some minutes, `full` within an hour on a quiet two-core machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BUDGET = 128
SMALL_SWAP = 256 * 2**20  # room for what sixteen sequences of the bundled model evict


def calidrop(theta1: float, policy: str = "snapkv") -> dict[str, Any]:
    return {"kv_budget": BUDGET, "kv_policy": policy, "kv_theta1": theta1, "kv_theta2": 0.85}


def evicted(policy: str = "snapkv") -> dict[str, Any]:
    return {"kv_budget": BUDGET, "kv_policy": policy, "kv_calibration": False}


@dataclass(frozen=True)
class Variant:
    """One way to serve the same requests: a backend (None: vLLM's own), and the requests' extra fields."""

    name: str
    backend: str | None
    fields: dict[str, Any] = field(default_factory=dict)


STOCK = Variant("stock", None)
NO_BUDGET = Variant("no budget", "calidrop")
EVICTION = Variant("eviction only", "calidrop", evicted())
CALIDROP_7 = Variant("CaliDrop .7/.85", "calidrop", calidrop(0.7))
CALIDROP_8 = Variant("CaliDrop .8/.85", "calidrop", calidrop(0.8))
MAIN = (STOCK, NO_BUDGET, EVICTION, CALIDROP_7, CALIDROP_8)
FEW = (STOCK, EVICTION, CALIDROP_7)
INT8 = Variant("CaliDrop .7/.85, int8", "calidrop", {**calidrop(0.7), "kv_codec": "int8"})
OTHER_POLICIES = tuple(
    variant
    for policy in ("h2o", "streaming_llm")
    for variant in (
        Variant(f"eviction only, {policy}", "calidrop", evicted(policy)),
        Variant(f"CaliDrop .7/.85, {policy}", "calidrop", calidrop(0.7, policy)),
        Variant(f"CaliDrop .8/.85, {policy}", "calidrop", calidrop(0.8, policy)),
    )
)
SIZES = tuple(
    Variant(f"CaliDrop .7/.85, {size} calibration tokens", "calidrop", {**calidrop(0.7), "kv_calibration_size": size})
    for size in (64, 256)
)


@dataclass(frozen=True)
class Load:
    """Prompts of `input` tokens, `output` tokens generated, `concurrency` at a time, for every variant in turn.

    shared: tokens all prompts begin with. spread: lengths are drawn between this part of `input` and all of it.
    """

    name: str
    input: int
    output: int
    concurrency: int
    prompts: int
    variants: tuple[Variant, ...]
    repeats: int = 1
    shared: int = 0
    spread: float = 1.0


@dataclass(frozen=True)
class Serving:
    """A server of one model for each backend, and the loads they get.

    blocks: the KV pool's, None for an ample one. swap_bytes: None for the default, twice the KV pool: a small one and
    prompts cut to an eighth fill the swap pool before the KV pool.
    """

    name: str
    model: str
    loads: tuple[Load, ...]
    max_model_len: int = 1152
    blocks: int | None = None
    swap_bytes: int | None = None


@dataclass(frozen=True)
class PoolCase:
    """Requests that share a pool of four full sequences. steps: stock's decode steps that are timed for the bound."""

    model: str
    input: int = 4096
    output: int = 512
    requests: int = 32
    steps: int = 40


@dataclass(frozen=True)
class Profile:
    operator_repeats: int
    step_lengths: dict[str, list[int]]
    steps: int
    compaction_lengths: list[int]
    compaction_repeats: int
    pool: PoolCase
    memory_length: int
    serving: tuple[Serving, ...]


def pool_of(sequences: int, tokens: int, block_size: int = 32) -> int:
    """Blocks of a pool that holds so many full sequences, and vLLM's null block."""
    return sequences * -(-tokens // block_size) + 1


def paper(concurrency: int, prompts: int, variants: tuple[Variant, ...], repeats: int = 1, **more: Any) -> Load:
    """The paper's workload. The bundled model ends at 1,152 positions: 1024 + 128 leave no room for the template."""
    return Load(more.pop("name", "paper"), 960, 128, concurrency, prompts, variants, repeats, **more)


POOL_OF_4 = Serving(
    "pool of 4", "small", (paper(16, 16, FEW, name="pool"),), blocks=pool_of(4, 1088), swap_bytes=SMALL_SWAP
)

QUICK = Profile(
    operator_repeats=8,
    step_lengths={"llama-2x1024": [1024, 4096]},
    steps=20,
    compaction_lengths=[4096],
    compaction_repeats=1,
    pool=PoolCase("llama-2x1024", 1024, 128, 16),
    memory_length=2048,
    serving=(
        Serving("ample", "small", (paper(16, 16, MAIN), paper(4, 8, FEW))),
        POOL_OF_4,
    ),
)

FULL = Profile(
    operator_repeats=8,
    step_lengths={"llama-2x1024": [1024, 4096, 8192], "llama-2x1024-d128": [1024]},
    steps=30,
    compaction_lengths=[2048, 8192],
    compaction_repeats=1,
    pool=PoolCase("llama-2x1024"),
    memory_length=8192,
    serving=(
        Serving("ample", "small", (
            paper(16, 16, (*MAIN, INT8, *SIZES), repeats=5),
            paper(16, 16, (STOCK, *OTHER_POLICIES), name="policies"),
            *(paper(c, n, FEW) for c, n in ((1, 2), (4, 8), (32, 32))),
            paper(16, 16, FEW, name="shared prefix", shared=512),
            paper(16, 16, FEW, name="mixed lengths", spread=0.1),
        )),
        # Four times as long: what is looked for is two parts in a hundred.
        Serving("without a budget", "small", (paper(16, 64, (STOCK, NO_BUDGET), repeats=6, name="without a budget"),)),
        POOL_OF_4,
        Serving("long inputs", "llama-2x1024", (
            Load("inputs", 1024, 128, 8, 8, FEW),
            Load("inputs", 4096, 256, 4, 4, FEW),
            Load("inputs", 8192, 256, 2, 2, (STOCK, EVICTION)),
        ), max_model_len=8704),
    ),
)  # fmt: skip

PROFILES = {"quick": QUICK, "full": FULL}
