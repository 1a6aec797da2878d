"""What becomes of a prompt, as arithmetic: from its settings, its length and the room in the pools. No ids, no vLLM.

The ledger asks it for every request, and `calidrop-server plan` for the one request that it plans with.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_calidrop.algorithm.placement import first_kept_block, view_start
from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.evicted.recall.balance import balance_queries
from vllm_calidrop.memory import PoolSizes
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.settings.request import RequestSettings

NOTHING = PoolSizes(0, 0, 0)


@dataclass(frozen=True)
class Decision:
    """mode: `calidrop`, `evict` (without calibration) and `full` are admissions; `wait` and `reject` are not.

    reason: why it is not `calidrop`, else None. kept, evicted: prompt tokens per KV head. stored: of the evicted, those
    that go to the swap pool. needs: what it takes of the pools. first_block, view_start: the blocks below and the
    tokens inside of block g that are freed and no longer attended. by_pages: recall by pages. read_bytes: of one read:
    a KV head group's stored tokens, or a page. most_reads: reads of a layer in a step on one rank; None: no bound.
    """

    mode: str
    reason: str | None
    prompt_len: int
    kept: int
    evicted: int = 0
    stored: int = 0
    needs: PoolSizes = NOTHING
    first_block: int = 0
    view_start: int = 0
    codec: str | None = None
    by_pages: bool = False
    read_bytes: int = 0
    most_reads: int | None = None

    @property
    def is_admission(self) -> bool:
        return self.mode not in ("wait", "reject")


def decide(
    settings: RequestSettings | None, prompt_len: int, shape: Shape, free: PoolSizes, sizes: PoolSizes
) -> Decision:
    """What becomes of a prompt of `prompt_len` tokens while `free` of the pools' `sizes` is free.

    settings: None where a request has none (pooling).
    """
    if settings is None or settings.kv_budget is None:
        return Decision("full", "no_budget", prompt_len, kept=prompt_len)
    if not evicts(settings, prompt_len):
        why = "policy_full" if settings.kv_policy == "full" else "prompt_within_budget"
        return Decision("full", why, prompt_len, kept=prompt_len)
    evicted = prompt_len - settings.kv_budget
    stored = _tokens_to_store(settings, evicted)
    needs, reason = _needs(settings, stored, shape), None if stored else "calibration_off"
    if not needs.fit_into(free):
        lacking = "swap_full" if needs.swap_blocks > free.swap_blocks else "recall_full"
        if settings.kv_on_full in ("wait", "reject"):
            reason = lacking if needs.fit_into(sizes) else "never_fits"
            return Decision(settings.kv_on_full, reason, prompt_len, kept=0)
        if settings.kv_on_full == "full":
            return Decision("full", lacking, prompt_len, kept=prompt_len)
        stored, needs, reason = 0, NOTHING, lacking
    codec, by_pages = shape.codec(settings.kv_codec), stored > 0 and settings.kv_recall == "pages"
    read_bytes = codec.page_read_bytes if by_pages else codec.run_bytes(stored)
    most_reads = None
    if stored and settings.kv_read_budget is not None:  # split evenly over layers and ranks
        most_reads = settings.kv_read_budget // (shape.num_layers * shape.ranks * read_bytes)
    return Decision(
        mode="calidrop" if stored else "evict",
        reason=reason,
        prompt_len=prompt_len,
        kept=settings.kv_budget,
        evicted=evicted,
        stored=stored,
        needs=needs,
        first_block=first_kept_block(prompt_len, settings.kv_budget, shape.block_size),
        view_start=view_start(prompt_len, settings.kv_budget, shape.block_size),
        codec=codec.name if stored else None,
        by_pages=by_pages,
        read_bytes=read_bytes,
        most_reads=most_reads,
    )


def evicts(settings: RequestSettings | None, prompt_len: int) -> bool:
    """Whether something of the prompt would be evicted if there is room for it."""
    return settings is not None and settings.compresses and prompt_len > (settings.kv_budget or 0)


def freed_blocks(settings: RequestSettings | None, prompt_len: int, shape: Shape) -> int:
    """g, the blocks that compaction would free; 0 where nothing is evicted."""
    if settings is None or settings.kv_budget is None or not evicts(settings, prompt_len):
        return 0
    return first_kept_block(prompt_len, settings.kv_budget, shape.block_size)


def prefill_bytes(settings: RequestSettings | None, prompt_len: int, shape: Shape) -> int:
    """What a worker holds for the policy and for the balance of recall until the prompt is complete."""
    if settings is None or not evicts(settings, prompt_len):
        return 0
    policy, for_balance = POLICIES[settings.kv_policy], balance_queries(settings.rest, prompt_len)
    return policy.prefill_bytes(shape, settings.kv_window, prompt_len, for_balance)


def allowed_hit(settings: RequestSettings | None, prompt_len: int, hit_tokens: int, shape: Shape) -> int:
    """How much of a prefix-cache hit may be used, in tokens."""
    if settings is None or settings.kv_budget is None or not evicts(settings, prompt_len):
        return hit_tokens
    policy, for_balance = POLICIES[settings.kv_policy], balance_queries(settings.rest, prompt_len)
    return policy.allowed_hit(
        hit_tokens, prompt_len, settings.kv_budget, settings.kv_window, shape.block_size, for_balance
    )


def _tokens_to_store(settings: RequestSettings, evicted: int) -> int:
    if not settings.calibrates:
        return 0
    return evicted if settings.kv_calibration_size is None else min(evicted, settings.kv_calibration_size)


def _needs(settings: RequestSettings, stored: int, shape: Shape) -> PoolSizes:
    swap_blocks = shape.codec(settings.kv_codec).blocks_for(stored)
    if not stored or settings.kv_recall != "pages":
        return PoolSizes(swap_blocks, 0, 0)
    return PoolSizes(swap_blocks, swap_blocks_for(stored), settings.kv_recall_buffer)
