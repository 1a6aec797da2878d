"""A KV pool that holds four full sequences, and many more requests than that, against a bound from stock's own times.

In this process and in processor time, so that the bound and what is held against it are disturbed alike.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.throughput.engine import BLOCK_SIZE, Engine, random_prompt
from benchmarks.throughput.profiles import BUDGET, PoolCase, pool_of
from benchmarks.throughput.steps import EVICTION
from benchmarks.throughput.timing import load


def measure(case: PoolCase) -> dict[str, Any]:
    """One run of all requests with eviction only, and the bound.

    The bound is the least time of a backend that has stock's speed and the compressed sizes: every prompt prefilled by
    itself at stock's own time, and every other token made in a stock step of as many sequences as the pool can hold
    compressed to the end (their prompts as long as half-way through the output), never fewer.
    """
    total = case.input + case.output
    per_sequence = -(-(BUDGET + case.output) // BLOCK_SIZE)
    allowed = min(case.requests, (pool_of(4, total) - 1) // per_sequence)
    prefill, step = _stock(case, allowed)
    decode_steps = case.requests * (case.output - 1) / allowed
    bound = case.requests * prefill + decode_steps * step
    found = _ours(case)
    return {
        "case": asdict(case),
        "load": load(),
        "allowed": allowed,
        "stock_prefill_seconds": prefill,
        "stock_step_seconds": step,
        "bound_seconds": bound,
        **found,
        "to_bound": found["seconds"] / bound,
    }


def _stock(case: PoolCase, sequences: int) -> tuple[float, float]:
    """Seconds of one prefill, and of a decode step of so many sequences with half of their output."""
    engine = Engine(case.model, None, case.input + case.output + 64, enable_prefix_caching=False)
    try:
        engine.submit([random_prompt(BLOCK_SIZE)], 4, {})  # what compiles or is first touched
        engine.finish()
        prefills = []
        for seed in range(2):
            engine.submit([random_prompt(case.input, seed)], 1, {})
            prefills.append(engine.prefill())
            engine.finish()
        prompts = [random_prompt(BUDGET + case.output // 2, seed) for seed in range(sequences)]
        engine.submit(prompts, case.steps + 8, {})
        engine.prefill()
        steps = [engine.step() for _ in range(case.steps)]
        engine.abort_all()
        return min(prefills), statistics.median(steps)
    finally:
        engine.close()


def _ours(case: PoolCase) -> dict[str, Any]:
    blocks = pool_of(4, case.input + case.output)
    engine = Engine(
        case.model, "calidrop", case.input + case.output + 64, enable_prefix_caching=False,
        num_gpu_blocks_override=blocks,
    )  # fmt: skip
    scheduler = engine.core.scheduler
    try:
        engine.submit([random_prompt(2 * BUDGET)], 4, EVICTION)
        engine.finish()
        engine.submit([random_prompt(case.input, 100 + i) for i in range(case.requests)], case.output, EVICTION)
        seconds, running, used, preempted = 0.0, [], 0, 0
        while engine.engine.has_unfinished_requests():
            seconds += engine.step()
            running.append((len(scheduler.running), len(scheduler.waiting)))
            used = max(used, blocks - 1 - scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
            preempted = max(preempted, sum(request.num_preemptions for request in scheduler.requests.values()))
        return {
            "seconds": seconds,
            "steps": len(running),
            "running_peak": max(count for count, _ in running),
            "running_while_others_wait": statistics.mean([count for count, waiting in running if waiting] or [0]),
            "preemptions": preempted,
            "peak_blocks": used,
            "blocks": blocks - 1,
        }
    finally:
        engine.close()
