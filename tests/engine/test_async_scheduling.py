"""Asynchronous scheduling: the next step is scheduled before the last one's tokens are known.

vLLM switches it off on CPU; the platform is overridden here, so that what GPUs run by default is tested.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.cases import MODEL, CachedReference, ask_of, covering_combinations, prompt_of
from tests.engine.harness import MAY_STOP, Ask, Engine, assert_equal_to_reference

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    from vllm.platforms.cpu import CpuPlatform

    from vllm_calidrop.hooks.engine.scheduler import use_our_scheduler

    checked = CpuPlatform.check_and_update_config

    def keeping_async(cls: type, vllm_config: Any) -> None:
        checked(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
        use_our_scheduler(vllm_config)  # once more, as after a rebuilt configuration: now over the asynchronous one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keeping_async))
        engine = Engine(
            MODEL,
            max_num_batched_tokens=200,
            num_gpu_blocks_override=45,
            additional_config={"calidrop": {"swap_bytes": 256 * 2**20}},
        )
    yield engine
    engine.close()


def test_the_asynchronous_scheduler_runs(engine: Engine) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert isinstance(engine.scheduler, AsyncScheduler)
    assert engine.core.batch_queue_size == 2
    in_flight = []
    schedule = engine.scheduler.schedule

    def watched(*args: object, **kwargs: object) -> object:
        in_flight.append(max((request.num_in_flight_tokens for request in engine.scheduler.running), default=0))
        return schedule(*args, **kwargs)

    engine.scheduler.schedule = watched
    try:
        engine.ask([Ask(prompt_of(300, 1), 10, {"kv_budget": 64})])
    finally:
        del engine.scheduler.schedule
    assert max(in_flight) > 0, "every step was processed before the next was scheduled"


def test_equal_to_the_reference(engine: Engine, reference: CachedReference) -> None:
    asks = [ask_of(combination, seed) for seed, combination in enumerate(covering_combinations())]
    assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
    engine.assert_nothing_in_use()


def test_preemption_and_aborts_leave_nothing(engine: Engine) -> None:
    rng = random.Random(9)
    alive = set()
    for index in range(20):
        settings = {"kv_budget": rng.choice((32, 64)), "kv_policy": "snapkv"} if index % 2 else {}
        engine.submit(f"a{index}", Ask(prompt_of(rng.choice((150, 300)), index), 300, settings), **MAY_STOP)
        alive.add(f"a{index}")
    engine._preempted.clear()
    for outputs in engine.steps():
        alive -= {output.request_id for output in outputs if output.finished}
        if alive and rng.random() < 0.01:
            victim = rng.choice(sorted(alive))
            engine.llm.llm_engine.abort_request([victim])
            alive.discard(victim)
    assert engine._preempted, "nobody was preempted: the test proves less than it says"
    engine.assert_nothing_in_use()
