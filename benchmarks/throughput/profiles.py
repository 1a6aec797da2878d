"""What is measured: `quick` (about ten minutes) and `full` (about an hour) on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BUDGET = 128


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
    """Prompts of `input` tokens, `output` tokens generated, `concurrency` at a time. shared: tokens all begin with;
    spread: lengths are drawn between this part of `input` and all of it."""

    input: int
    output: int
    concurrency: int
    prompts: int
    shared: int = 0
    spread: float = 1.0


@dataclass(frozen=True)
class Serving:
    """Servers of one model, side by side, and the loads they get. blocks: the KV pool's, None for an ample one."""

    name: str
    model: str
    loads: tuple[Load, ...]
    variants: tuple[Variant, ...]
    repeats: int = 3
    max_model_len: int = 1152
    blocks: int | None = None
    prefix_caching: bool = False


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
    serving: tuple[Serving, ...]


# The bundled model ends at 1,152 positions: the paper's 1024 + 128 tokens leave no room for the template.
PAPER = Load(960, 128, 16, 64)


def pool_of_four(tokens: int, block_size: int = 32) -> int:
    return 4 * -(-tokens // block_size) + 1


QUICK = Profile(
    operator_repeats=15,
    step_lengths={"llama-8x1024": [1024, 4096]},
    steps=40,
    compaction_lengths=[8192],
    compaction_repeats=2,
    serving=(
        Serving("paper", "small", (PAPER, *(Load(960, 128, c, max(8, 2 * c)) for c in (1, 4, 32))), MAIN),
        Serving("wider model", "llama-8x1024", (Load(1024, 128, 16, 16),), (STOCK, NO_BUDGET, EVICTION)),
        Serving("pool of four", "small", (Load(960, 128, 16, 32),), FEW, repeats=2, blocks=pool_of_four(1088)),
    ),
)

FULL = Profile(
    operator_repeats=40,
    step_lengths={"llama-8x1024": [1024, 4096, 8192], "llama-8x1024-d128": [1024, 4096]},
    steps=100,
    compaction_lengths=[2048, 8192],
    compaction_repeats=3,
    serving=(
        Serving(
            "paper", "small", (PAPER, *(Load(960, 128, c, max(16, 2 * c)) for c in (1, 2, 4, 8, 32, 64))),
            (*MAIN, *SIZES), repeats=5,
        ),
        Serving("policies", "small", (PAPER,), (STOCK, *OTHER_POLICIES)),
        Serving("shared prefix", "small", (Load(960, 128, 16, 48, shared=512),), FEW, prefix_caching=True),
        Serving("mixed", "small", (Load(960, 128, 16, 64, spread=0.1),), FEW),
        *(
            Serving(f"pool of {full}", "small", (Load(960, 128, 32, 64),), FEW, blocks=pool_of_four(1088) * full // 4)
            for full in (4, 8, 16)
        ),
        Serving(
            "inputs", "llama-8x1024",
            (Load(1024, 128, 16, 16), Load(4096, 256, 8, 8), Load(8192, 256, 4, 4)),
            (STOCK, NO_BUDGET, EVICTION), max_model_len=8704,
        ),
        Serving(
            "pool of four, 4096", "llama-8x1024", (Load(4096, 512, 32, 32),), (STOCK, EVICTION), repeats=1,
            max_model_len=4672, blocks=pool_of_four(4608),
        ),
        Serving("head_dim 128", "llama-8x1024-d128", (Load(1024, 128, 16, 16),), (STOCK, NO_BUDGET, EVICTION)),
    ),
)  # fmt: skip

PROFILES = {"quick": QUICK, "full": FULL}
