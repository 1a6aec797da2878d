"""The ledger: who is admitted with what, when ids are free again, what reports say, and who must wait."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_calidrop.algorithm.placement import first_kept_block
from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.memory import PoolSizes
from vllm_calidrop.records import COUNTERS, SequenceCounters, SequenceRecord
from vllm_calidrop.scheduler.headroom import KVBlocks, most_blocks, outgrows
from vllm_calidrop.scheduler.ledger import Ledger
from vllm_calidrop.scheduler.living import settings_of
from vllm_calidrop.scheduler.reports import NEWS_EVERY
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.settings.request import RECORD_KEY
from vllm_calidrop.settings.server import ServerSettings, resolve_request
from vllm_calidrop.worker.sequences import SequenceTable

SHAPE = Shape(block_size=16, num_layers=2, num_kv_heads=2, num_query_heads=4, head_dim=16, dtype=torch.float16)
NOTHING = dict.fromkeys(("sequences", "swap_blocks", "sketch_blocks", "buffer_pages", "state_slots", "quarantine"), 0)
names = (f"r{number}" for number in itertools.count())


def make_request(prompt_len: int, outputs: int = 0, **asked: Any) -> Request:
    """vLLM's own request, with the record the API process would have put on it."""
    record = resolve_request(asked, ServerSettings()).to_record()
    params = SamplingParams(max_tokens=100, extra_args={RECORD_KEY: record})
    request = Request(next(names), [1] * prompt_len, params, None)
    request.append_output_token_ids([2] * outputs)
    return request


def make_ledger(
    swap_blocks: int = 100, slots: int = 8, prefill_state_limit: int = 2**30, sketches: int = 100, buffers: int = 10
) -> Ledger:
    return Ledger(SHAPE, PoolSizes(swap_blocks, sketches, buffers), slots, prefill_state_limit)


def admit(ledger: Ledger, request: Request) -> SequenceRecord | None:
    """Admitted and confirmed; the record the workers will get, if any."""
    ledger.admit(request)
    ledger.confirm(request)
    return ledger._living[request.request_id].record


def counters_for(record: SequenceRecord, value: int) -> dict[str, SequenceCounters]:
    counts = np.full((SHAPE.num_layers, len(COUNTERS)), value, dtype=np.int64)
    return {record.request_id: SequenceCounters.of(record.admission, counts)}


def report_of(ledger: Ledger, request: Request) -> dict[str, Any]:
    report = ledger.reports.said(request.request_id, finished=True)
    assert report is not None
    return report


def waits(ledger: Ledger, request: Request, needed: int, free: int, held: dict[str, int], chunk: int) -> bool:
    """Whether `request` must wait while it needs so many blocks and `free` are; the pool holds any outputs."""
    shared = -(-request.num_tokens // SHAPE.block_size) - needed
    return ledger.must_wait(request, KVBlocks(10**9, free, held, shared, chunk))


def outgrown(ledger: Ledger, request: Request, total_blocks: int) -> bool:
    return outgrows(request, list(ledger._living.values()), total_blocks, SHAPE)


def run_step(ledger: Ledger, counters: dict[str, SequenceCounters] | None = None) -> None:
    ledger.step_scheduled()
    ledger.step_processed(counters or {})


# what is decided


def test_record_of_a_sequence_that_will_be_compacted() -> None:
    ledger = make_ledger()
    request = make_request(1000, outputs=7, kv_budget=100, kv_theta1=0.1, kv_theta2=0.2, kv_gate="head", kv_window=9,
                           kv_pool_kernel=3, kv_sinks=2)  # fmt: skip
    record = admit(ledger, request)
    assert record is not None
    assert (record.prompt_len, record.compaction_point, record.budget) == (1000, 1007, 100)
    assert (record.first_block, record.view_start) == (56, 4)  # 900 = 56 * 16 + 4
    assert (record.stored, len(record.swap_blocks)) == (900, 8)
    assert (record.policy, record.window, record.pool_kernel, record.sinks) == ("snapkv", 9, 3, 2)
    assert (record.theta1, record.theta2, record.gate) == (0.1, 0.2, 1)
    assert ledger.first_block_of(request.request_id) == 56
    assert ledger.in_use == NOTHING | {"sequences": 1, "swap_blocks": 8, "state_slots": 1}
    assert ledger.step_scheduled().admitted == [record]
    assert ledger.step_scheduled().admitted == []


@pytest.mark.parametrize(
    ("asked", "stored", "mode", "reason"),
    [
        ({}, 900, "calidrop", None),
        ({"kv_calibration_size": 300}, 300, "calidrop", None),
        ({"kv_calibration_size": 5000}, 900, "calidrop", None),
        ({"kv_calibration_size": 0}, 0, "evict", "calibration_off"),
        ({"kv_calibration": False}, 0, "evict", "calibration_off"),
    ],
)
def test_what_is_stored(asked: dict[str, Any], stored: int, mode: str, reason: str | None) -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100, **asked)
    record = admit(ledger, request)
    assert record is not None and record.stored == stored
    assert ledger.in_use["swap_blocks"] == swap_blocks_for(stored)
    report = report_of(ledger, request)
    expected = {"prompt_tokens": 1000, "kept": 100, "evicted": 900, "mode": mode, "reason": reason}
    assert {name: report[name] for name in expected} == expected


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("recall", ["all", "pages"])
def test_codecs_take_their_own_number_of_blocks(codec: str, recall: str) -> None:
    """And bytes read again are encoded bytes; sketches are as large with every codec."""
    ledger = make_ledger()
    request = make_request(5000, kv_budget=100, kv_codec=codec, kv_recall=recall)
    record = admit(ledger, request)
    bound = SHAPE.codec(codec)
    assert record is not None and record.codec == codec
    assert len(record.swap_blocks) == -(-4900 // bound.tokens_per_block) == ledger.in_use["swap_blocks"]
    assert record.recall is None or len(record.recall.sketch_blocks) == swap_blocks_for(4900)
    run_step(ledger, counters_for(record, 3))
    read = bound.page_read_bytes if recall == "pages" else bound.run_bytes(4900)
    report = report_of(ledger, request)
    assert (report["codec"], report["bytes_read"]) == (codec, 2 * 3 * read)
    ledger.release(request.request_id)
    run_step(ledger)
    assert set(ledger.in_use.values()) == {0}


def test_mixed_codecs_share_the_blocks_until_none_is_left() -> None:
    """No block is a codec's own: whatever was given back serves the next, to the last block."""
    ledger = make_ledger(swap_blocks=24)
    asked = [{"kv_codec": codec} for codec in ("int2", "none", "int4", "int8")]
    requests = [make_request(1124, kv_budget=100, **each) for each in asked]
    records = [admit(ledger, request) for request in requests]
    taken = [record.swap_blocks for record in records if record is not None]
    assert [len(blocks) for blocks in taken] == [SHAPE.codec(each["kv_codec"]).blocks_for(1024) for each in asked]
    assert len({block for blocks in taken for block in blocks}) == sum(map(len, taken))
    run_step(ledger)
    left = ledger.ids.swap.num_free
    for request in requests[::2]:
        ledger.release(request.request_id)
    run_step(ledger)
    assert ledger.ids.swap.num_free == left + len(taken[0]) + len(taken[2])
    last = admit(ledger, make_request(100 + 128 * ledger.ids.swap.num_free, kv_budget=100))
    assert last is not None and last.stored > 0
    assert ledger.ids.swap.num_free == 0


@pytest.mark.parametrize(
    ("budget", "recall", "codec", "most"),
    [
        (None, "all", "none", None),
        (0, "all", "none", 0),
        (2 * 900 * 64 - 1, "all", "none", 0),
        (2 * 900 * 64, "all", "none", 1),
        (2**62, "all", "none", 2**62 // (2 * 900 * 64)),
        (2 * 3 * 1024, "pages", "none", 3),
        (2 * 3 * SHAPE.codec("int4").run_bytes(900) + 1, "all", "int4", 3),
        (2 * 5 * SHAPE.codec("int2").page_read_bytes, "pages", "int2", 5),
    ],
)
def test_read_budget_is_split_over_layers(budget: int | None, recall: str, codec: str, most: int | None) -> None:
    """In reads of encoded bytes; two ranks have half of it each."""
    request = make_request(1000, kv_budget=100, kv_read_budget=budget, kv_recall=recall, kv_codec=codec)
    record = admit(make_ledger(), request)
    assert record is not None and record.most_reads == most
    two = Ledger(dataclasses.replace(SHAPE, ranks=2), PoolSizes(100, 100, 10), 8, 2**30)
    record = admit(two, request)
    assert record is not None and record.most_reads == (None if most is None else most // 2)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "no_budget"),
        ({"kv_budget": 100, "kv_policy": "full"}, "policy_full"),
        ({"kv_budget": 1000}, "prompt_within_budget"),
        ({"kv_budget": 1001}, "prompt_within_budget"),
    ],
)
def test_what_is_kept_whole(asked: dict[str, Any], reason: str) -> None:
    ledger = make_ledger()
    request = make_request(1000, **asked)
    assert admit(ledger, request) is None
    assert ledger.first_block_of(request.request_id) is None
    assert ledger.step_scheduled().admitted == []
    report = report_of(ledger, request)
    assert (report["kept"], report["evicted"], report["mode"], report["reason"]) == (1000, 0, "full", reason)
    assert "layers" not in report
    ledger.release(request.request_id)
    assert ledger.step_scheduled().released == [], "the workers never knew it"


def test_a_request_without_a_record_is_kept_whole() -> None:
    request = Request("pooling", [1] * 1000, SamplingParams(max_tokens=1), None)
    assert settings_of(request) is None
    ledger = make_ledger()
    assert admit(ledger, request) is None
    assert ledger.allowed_hit(request, 320) == 320
    assert report_of(ledger, request)["reason"] == "no_budget"


@pytest.mark.parametrize(("on_full", "mode", "kept"), [("full", "full", 1000), ("evict", "evict", 100)])
def test_full_swap_pool_is_reported_and_counted_once(on_full: str, mode: str, kept: int) -> None:
    """An admission that vLLM takes back is not counted; one block too few is too few."""
    ledger = make_ledger(swap_blocks=7)
    request = make_request(1000, kv_budget=100, kv_on_full=on_full)
    ledger.admit(request)
    ledger.cancel(request)
    assert ledger.totals.fallbacks == {"swap_full": 0, "recall_full": 0}
    record = admit(ledger, request)
    report = report_of(ledger, request)
    assert (report["mode"], report["reason"], report["kept"]) == (mode, "swap_full", kept)
    assert (record is None) == (on_full == "full")
    assert record is None or (record.stored, record.swap_blocks) == (0, ())
    assert ledger.totals.fallbacks == {"swap_full": 1, "recall_full": 0}
    assert ledger.in_use["swap_blocks"] == 0


def test_cancel_gives_everything_back_and_tells_nobody() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    for _ in range(3 * ledger.ids.slots.size):
        ledger.admit(request)
        assert ledger.is_admitted(request)
        ledger.cancel(request)
        assert not ledger.is_admitted(request)
    assert set(ledger.in_use.values()) == {0}
    step = ledger.step_scheduled()
    assert (step.admitted, step.released) == ([], [])


# prefix hits


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ({}, 960),
        ({"kv_budget": 1000}, 960),
        ({"kv_budget": 100, "kv_policy": "full"}, 960),
        ({"kv_budget": 100}, 896),  # blocks below g = 56
        ({"kv_budget": 48, "kv_window": 48}, 944),  # not the window: 952 in whole blocks
        ({"kv_budget": 48, "kv_window": 48, "kv_policy": "streaming_llm"}, 944),
        ({"kv_budget": 100, "kv_policy": "h2o"}, 0),
    ],
)
def test_allowed_hit(asked: dict[str, Any], allowed: int) -> None:
    assert make_ledger().allowed_hit(make_request(1000, **asked), 960) == allowed


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ({}, 992),
        ({"kv_recall": "pages"}, 992),
        ({"kv_recall": "pages", "kv_recall_rest": "v2"}, 960),  # the queries of the last 32 positions are computed
        ({"kv_recall": "pages", "kv_recall_rest": "v1", "kv_policy": "snapkv", "kv_window": 8}, 960),
        ({"kv_recall": "all", "kv_recall_rest": "v2"}, 992),
        ({"kv_recall": "pages", "kv_recall_rest": "v2", "kv_calibration": False}, 992),
    ],
)
def test_a_rest_needs_the_last_queries_whatever_the_policy(asked: dict[str, Any], allowed: int) -> None:
    request = make_request(1000, kv_budget=8, **{"kv_policy": "streaming_llm", **asked})
    assert make_ledger().allowed_hit(request, 992) == allowed


# when blocks can be freed


def test_freeable_once_and_only_after_the_compaction_step_was_processed() -> None:
    ledger = make_ledger()
    request = make_request(1000, outputs=5, kv_budget=100)
    admit(ledger, request)
    admit(ledger, make_request(1000))
    for computed, in_flight in [(0, 0), (1004, 0), (1005, 5), (1006, 2)]:
        request.num_computed_tokens, request.num_in_flight_tokens = computed, in_flight
        assert ledger.take_freeable() == []
    request.num_in_flight_tokens = 1
    assert ledger.take_freeable() == [(request.request_id, 56)]
    assert ledger.take_freeable() == []


# release, quarantine


def test_release_without_a_step_in_flight_gives_ids_back_at_once() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    admit(ledger, request)
    run_step(ledger)
    ledger.release(request.request_id)
    assert set(ledger.in_use.values()) == {0}
    step = ledger.step_scheduled()
    assert (step.released, step.admitted) == ([request.request_id], [])
    ledger.release(request.request_id)  # vLLM frees a request it never admitted, too
    assert ledger.step_scheduled().released == []


def test_release_waits_for_all_steps_in_flight() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    admit(ledger, request)
    for _ in range(3):
        ledger.step_scheduled()
    ledger.release(request.request_id)
    for _ in range(3):
        assert ledger.in_use == NOTHING | {"swap_blocks": 8, "state_slots": 1, "quarantine": 1}
        ledger.step_processed({})
    assert set(ledger.in_use.values()) == {0}


def test_preempted_in_the_schedule_that_admitted_it() -> None:
    """The workers hear nothing of that life; the one before it is still to be ended."""
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    admit(ledger, request)
    run_step(ledger)
    ledger.release(request.request_id)
    admit(ledger, request)
    ledger.release(request.request_id)
    step = ledger.step_scheduled()
    assert (step.released, step.admitted) == ([request.request_id], [])
    ledger.step_processed({})
    assert set(ledger.in_use.values()) == {0}


# reports


def test_counters_accumulate_over_preemptions() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    lives = []
    for value in (3, 5):
        record = admit(ledger, request)
        assert record is not None
        lives.append(record)
        run_step(ledger, counters_for(record, 1))
        run_step(ledger, counters_for(record, value))
        ledger.release(request.request_id)
    run_step(ledger, counters_for(lives[0], 1000))  # a late step of a life that is over
    report = report_of(ledger, request)
    assert report["recomputes"] == report["merges"] == report["plain"] == SHAPE.num_layers * (3 + 5)
    assert report["layers"]["group_reads"] == [8, 8]
    assert report["bytes_read"] == 16 * 900 * SHAPE.kv_bytes_per_token


def test_counters_of_another_life_are_not_taken() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    first = admit(ledger, request)
    run_step(ledger)
    ledger.release(request.request_id)
    second = admit(ledger, request)
    assert first is not None and second is not None and second.admission > first.admission
    run_step(ledger, counters_for(first, 7))
    assert report_of(ledger, request)["recomputes"] == 0
    run_step(ledger, counters_for(second, 2))
    assert report_of(ledger, request)["recomputes"] == 2 * SHAPE.num_layers


def test_bytes_read_in_a_life_before_a_fallback_are_not_forgotten() -> None:
    """After the preemption the pool is full, so nothing is stored any more; what was read was read."""
    ledger = make_ledger(swap_blocks=8)
    request = make_request(1000, kv_budget=100)
    record = admit(ledger, request)
    assert record is not None
    run_step(ledger, counters_for(record, 3))
    ledger.release(request.request_id)
    other = make_request(1000, kv_budget=100)
    assert admit(ledger, other) is not None
    assert admit(ledger, request) is None
    report = report_of(ledger, request)
    assert (report["mode"], report["reason"], report["group_reads"]) == ("full", "swap_full", 6)
    assert report["bytes_read"] == 6 * 900 * SHAPE.kv_bytes_per_token


def test_layers_only_at_the_end_and_reports_are_dropped_with_their_requests() -> None:
    ledger = make_ledger()
    request, other = make_request(1000, kv_budget=100), make_request(1000)
    record = admit(ledger, request)
    assert record is not None
    admit(ledger, other)
    run_step(ledger, counters_for(record, 1))
    running = ledger.reports.said(request.request_id, finished=False)
    assert running is not None and "layers" not in running
    assert "layers" in report_of(ledger, request)
    ledger.forget(alive={other.request_id})
    assert ledger.reports.said(request.request_id, finished=True) is None
    assert ledger.reports.said(other.request_id, finished=True) is not None


# everything at once: a scheduler that admits, cancels, preempts, finishes and aborts with up to two steps in flight


class SchedulerMachine(RuleBasedStateMachine):
    """vLLM's scheduler as the ledger sees it, and the workers' SequenceTable behind it.

    Checked against a plain account: no id handed out again while a step that may touch it is in flight; workers can
    apply every step's records; reports count each life once.
    """

    MAX_RUNNING, IN_FLIGHT, SWAP_BLOCKS = 3, 2, 14

    def __init__(self) -> None:
        super().__init__()
        self.ledger = make_ledger(self.SWAP_BLOCKS, slots=self.MAX_RUNNING * self.IN_FLIGHT)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.workers = SequenceTable(self.MAX_RUNNING * self.IN_FLIGHT)
        self.in_flight: deque[dict[str, SequenceRecord]] = deque()
        self.on_workers: dict[str, SequenceRecord] = {}
        self.steps_of_life: dict[int, int] = {}
        self.counted: dict[str, dict[int, int]] = {}

    @rule(
        prompt_len=st.integers(1, 600),
        budget=st.none() | st.integers(1, 300),
        on_full=st.sampled_from(["full", "evict"]),
        calibration=st.booleans(),
    )
    def arrive(self, prompt_len: int, budget: int | None, on_full: str, calibration: bool) -> None:
        asked = {"kv_budget": budget, "kv_on_full": on_full, "kv_calibration": calibration}
        self.waiting.append(make_request(prompt_len, **asked))

    @precondition(lambda self: len(self.in_flight) < self.IN_FLIGHT)
    @rule(preempted=st.integers(0, 2), found_blocks=st.lists(st.booleans(), max_size=4))
    def schedule(self, preempted: int, found_blocks: list[bool]) -> None:
        for _ in range(min(preempted, len(self.running))):
            victim = self.running.pop()
            self.ledger.release(victim.request_id)
            victim.append_output_token_ids(3)
            self.waiting.insert(0, victim)
        for found in found_blocks:
            if not self.waiting or len(self.running) == self.MAX_RUNNING:
                break
            request = self.waiting[0]
            self.ledger.admit(request)
            if not found:
                self.ledger.cancel(request)
                break
            self.ledger.confirm(request)
            self.running.append(self.waiting.pop(0))
        step = self.ledger.step_scheduled()
        touched = [record for records in self.in_flight for record in records.values()]
        for record in step.admitted:
            for other in touched:
                assert other.slot != record.slot
                assert not set(other.swap_blocks) & set(record.swap_blocks)
        self.workers.apply(step)
        for request_id in step.released:
            del self.on_workers[request_id]
        self.on_workers |= {record.request_id: record for record in step.admitted}
        assert set(self.on_workers) <= {request.request_id for request in self.running}
        self.in_flight.append(dict(self.on_workers))

    @precondition(lambda self: self.in_flight)
    @rule(finished=st.integers(0, 2))
    def process(self, finished: int) -> None:
        counters: dict[str, SequenceCounters] = {}
        admissions = {
            i: admitted.record.admission for i, admitted in self.ledger._living.items() if admitted.record is not None
        }
        for request_id, record in self.in_flight.popleft().items():
            steps = self.steps_of_life[record.admission] = self.steps_of_life.get(record.admission, 0) + 1
            counters |= counters_for(record, steps)
            if admissions.get(request_id) == record.admission:
                self.counted.setdefault(request_id, {})[record.admission] = steps
        self.ledger.step_processed(counters)
        for _ in range(min(finished, len(self.running))):
            self.ledger.release(self.running.pop(0).request_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.ledger.release(request.request_id)

    @invariant()
    def nobody_shares_an_id(self) -> None:
        held = [living.held for living in self.ledger._living.values() if living.held is not None]
        held += [ids for _, ids in self.ledger._quarantine]
        slots = [slot for ids in held for slot in ids.slots]
        blocks = [block for ids in held for block in ids.swap_blocks]
        assert len(set(slots)) == len(slots) and len(set(blocks)) == len(blocks)
        assert self.ledger.in_use["swap_blocks"] == len(blocks)
        assert self.ledger.in_use["state_slots"] == len(slots)
        assert self.ledger.in_use["sequences"] == len(self.running)

    @invariant()
    def reports_count_every_life_once(self) -> None:
        for request in self.running:
            expected = SHAPE.num_layers * sum(self.counted.get(request.request_id, {}).values())
            assert report_of(self.ledger, request)["merges"] == expected

    def teardown(self) -> None:
        for request in self.running:
            self.ledger.release(request.request_id)
        self.running.clear()
        while self.in_flight:
            self.process(0)
        self.workers.apply(self.ledger.step_scheduled())
        assert set(self.ledger.in_use.values()) == {0}
        assert len(self.workers) == 0


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


# who must wait

BLOCK = SHAPE.block_size


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Pool:
    """vLLM's block pool and running list, by counting. `held` counts block-table columns, freed ones included."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.running: list[Request] = []
        self.held: dict[str, int] = {}
        self.freed: dict[str, int] = {}

    @property
    def used(self) -> int:
        return sum(self.held.values()) - sum(self.freed.values())

    def join(self, request: Request, computed: int) -> None:
        self.ledger.admit(request)
        self.ledger.confirm(request)
        self.running.append(request)
        request.num_computed_tokens = computed
        self.held[request.request_id] = blocks_for(computed)

    def free_compacted(self) -> None:
        self.freed |= dict(self.ledger.take_freeable())

    def step(self, chunk: int) -> None:
        """One scheduler step, oldest first; a request that has computed all its tokens gets a new one."""
        self.free_compacted()
        for request in self.running:
            tokens = min(request.num_tokens - request.num_computed_tokens, chunk)
            chunk -= tokens
            request.num_computed_tokens += tokens
            self.held[request.request_id] = blocks_for(request.num_computed_tokens)
            if tokens and request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(3)


@st.composite
def others(draw: Any) -> list[tuple[Request, int]]:
    """Requests that run already, and how far they are: in their prompt or decoding, with a budget or without."""
    running = []
    for _ in range(draw(st.integers(1, 6))):
        prompt_len, outputs = draw(st.integers(1, 200)), draw(st.integers(1, 40))
        asked = {"kv_budget": draw(st.none() | st.integers(1, 200)), "kv_policy": "streaming_llm"}
        if draw(st.booleans()):
            request = make_request(prompt_len, outputs, **asked)
            running.append((request, prompt_len + outputs - 1))
        else:
            running.append((make_request(prompt_len, **asked), draw(st.integers(0, prompt_len - 1))))
    return running


@settings(max_examples=300)
@given(others(), st.integers(2, 300), st.integers(8, 300), st.integers(1, 300))
def test_what_is_admitted_is_compacted_before_anybody_needs_more_blocks(
    running: list[tuple[Request, int]], prompt_len: int, chunk: int, budget: int
) -> None:
    """No preemption while the newcomer's prompt is uncompressed: simulated with the fewest blocks that admit it."""
    ledger = make_ledger(swap_blocks=10_000)
    pool = Pool(ledger)
    for request, computed in running:
        pool.join(request, computed)
        record = ledger._living[request.request_id].record
        if record is not None:  # it was admitted when it had no outputs
            object.__setattr__(record, "compaction_point", request.num_prompt_tokens)
    pool.free_compacted()
    newcomer = make_request(prompt_len, kv_budget=min(budget, prompt_len - 1), kv_policy="streaming_llm")
    needed = blocks_for(prompt_len)
    free = next(n for n in range(needed, 10_000) if not waits(ledger, newcomer, needed, n, pool.held, chunk))
    total = pool.used + free
    pool.join(newcomer, 0)
    steps = 0
    while newcomer.num_computed_tokens < prompt_len:
        pool.step(chunk)
        steps += 1
        assert pool.used <= total, (steps, pool.used, total)


def test_nobody_waits_who_is_alone_or_where_nobody_compresses() -> None:
    ledger = make_ledger()
    assert not waits(ledger, make_request(1000, kv_budget=10), 63, 0, {}, 100)
    admit(ledger, make_request(1000))
    assert not waits(ledger, make_request(1000), 63, 0, {}, 100)
    assert not waits(ledger, make_request(1000, kv_budget=1000), 63, 0, {}, 100)
    assert waits(ledger, make_request(1000, kv_budget=999), 63, 0, {}, 100)


def test_a_prompt_without_budget_waits_for_others_that_have_one() -> None:
    ledger = make_ledger()
    admit(ledger, make_request(1000, kv_budget=100))
    assert waits(ledger, make_request(100), 7, 7, {}, 100)


def test_headroom_is_not_wasted() -> None:
    """One decoding sequence, a prompt of one chunk: one block more than the prompt is enough."""
    ledger = make_ledger()
    other = make_request(1000, outputs=1, kv_budget=100)
    admit(ledger, other)
    other.num_computed_tokens = 1000
    held = {other.request_id: 63}
    newcomer = make_request(100, kv_budget=50)
    assert waits(ledger, newcomer, 7, 7, held, chunk=200)
    assert not waits(ledger, newcomer, 7, 8, held, chunk=200)


def test_a_report_is_told_when_it_is_new_and_at_the_end() -> None:
    ledger = make_ledger()
    compacted, plain = make_request(1000, kv_budget=100), make_request(50)
    compacted.sampling_params.stop = ["the API process alone sees this"]
    records = {request.request_id: admit(ledger, request) for request in (compacted, plain)}
    record = records[compacted.request_id]
    assert record is not None
    for request in (compacted, plain):
        assert ledger.reports.news(request.request_id, finished=False) == ledger.reports.said(
            request.request_id, finished=False
        )
        assert ledger.reports.news(request.request_id, finished=False) is None
    for value in (1, 2):
        run_step(ledger, counters_for(record, value))
        assert ledger.reports.news(plain.request_id, finished=False) is None
        news = ledger.reports.news(compacted.request_id, finished=False)
        assert news is not None and news["recomputes"] == value * SHAPE.num_layers
        assert news["pages_read"] == value * SHAPE.num_layers * -(-900 // 16)
    for request in (compacted, plain):
        assert ledger.reports.news(request.request_id, finished=True) == report_of(ledger, request)
    ledger.release(compacted.request_id)
    admit(ledger, compacted)
    assert ledger.reports.news(compacted.request_id, finished=False) is not None, "a new life is news"


def test_a_report_whose_end_the_engine_sees_is_told_now_and_then() -> None:
    ledger = make_ledger()
    request = make_request(1000, kv_budget=100)
    record = admit(ledger, request)
    assert record is not None and ledger.reports.news(request.request_id, finished=False) is not None
    told = []
    for step in range(1, 2 * NEWS_EVERY + 2):
        run_step(ledger, counters_for(record, step))
        if ledger.reports.news(request.request_id, finished=False) is not None:
            told.append(step)
    assert told == [NEWS_EVERY, 2 * NEWS_EVERY]
    assert ledger.reports.news(request.request_id, finished=True) == report_of(ledger, request)


def certain(request: Request, tokens: int) -> Request:
    request.sampling_params.ignore_eos, request.max_tokens = True, tokens
    return request


def test_outputs_that_are_certain_must_fit_beside_each_other() -> None:
    """Three sequences of 100 kept and 60 certain outputs hold 10 blocks each at the end."""
    ledger = make_ledger()
    for _ in range(2):
        admit(ledger, certain(make_request(1060, kv_budget=100), 60))
    newcomer = certain(make_request(1060, kv_budget=100), 60)
    first = first_kept_block(1060, 100, SHAPE.block_size)
    each = -(-(1120 - first * SHAPE.block_size) // SHAPE.block_size)
    assert outgrown(ledger, newcomer, 3 * each - 1)
    assert not outgrown(ledger, newcomer, 3 * each)
    assert not outgrown(make_ledger(), newcomer, 1), "alone it is admitted: vLLM's own rules refuse what never fits"
    assert not outgrown(ledger, make_request(1060, kv_budget=100), 2 * each + 7), "it may end at once"
    newcomer.sampling_params.stop = ["."]
    assert not outgrown(ledger, newcomer, 2 * each + 7), "and so may this one"


def test_sequences_that_end_earlier_leave_room() -> None:
    assert most_blocks([10, 10], [6, 22], 16) == 2, "when the first ends both hold one; then the other grows alone"
    assert most_blocks([10, 10], [22, 22], 16) == 4
    assert most_blocks([16, 1], [0, 0], 16) == 2
    assert most_blocks([], [], 16) == 0


def test_without_a_budget_in_sight_growth_is_vllms_own_matter() -> None:
    ledger = make_ledger()
    admit(ledger, certain(make_request(1000), 100))
    assert not outgrown(ledger, certain(make_request(1000), 100), 1)
    assert outgrown(ledger, certain(make_request(1000, kv_budget=10), 100), 1)


@pytest.mark.parametrize(("policy", "each"), [("snapkv", 2 * 32 * 4 * 32), ("h2o", 2 * 2 * 1000 * 4)])
def test_prompts_wait_while_prefill_state_is_full(policy: str, each: int) -> None:
    """Two may stash, the third waits until one prompt is complete; alone, a prompt may exceed the limit."""
    asked = {"kv_budget": 100, "kv_policy": policy}
    assert POLICIES[policy].prefill_bytes(SHAPE, 32, 1000) == each
    ledger = make_ledger(prefill_state_limit=2 * each)
    prefilling = [make_request(1000, **asked) for _ in range(2)]
    for request in prefilling:
        assert not waits(ledger, request, 0, 10**6, {}, 100)
        admit(ledger, request)
    third = make_request(1000, **asked)
    assert waits(ledger, third, 0, 10**6, {}, 100)
    assert not waits(ledger, make_request(1000), 0, 10**6, {}, 100)
    assert not waits(ledger, make_request(1000, kv_budget=100, kv_policy="streaming_llm"), 0, 10**6, {}, 100)
    prefilling[0].num_computed_tokens = 1000
    assert not waits(ledger, third, 0, 10**6, {}, 100)

    tight = make_ledger(prefill_state_limit=each - 1)
    assert not waits(tight, third, 0, 10**6, {}, 100)
    admit(tight, third)
    assert waits(tight, make_request(1000, **asked), 0, 10**6, {}, 100)


@pytest.mark.parametrize("budget", [1, 99])
def test_first_block_is_the_layouts(budget: int) -> None:
    record = admit(make_ledger(), make_request(100, kv_budget=budget))
    assert record is not None and record.first_block == first_kept_block(100, budget, BLOCK)


# recall by pages

PAGES = {"kv_budget": 100, "kv_recall": "pages"}


def test_recall_reserves_a_sketch_and_a_buffer() -> None:
    ledger = make_ledger()
    request = make_request(1000, **PAGES, kv_recall_buffer=3, kv_recall_top_p=0.9, kv_recall_theta=0.5)
    record = admit(ledger, request)
    assert record is not None and record.recall is not None
    recall = record.recall
    assert len(recall.sketch_blocks) == len(record.swap_blocks) == 8 and len(recall.buffer_ids) == 3
    assert (recall.theta, recall.eps, recall.top_p, recall.most) == (0.5, 0.05, 0.9, 64)
    assert (ledger.in_use["sketch_blocks"], ledger.in_use["buffer_pages"]) == (8, 3)
    ledger.release(request.request_id)
    run_step(ledger)
    assert ledger.in_use == NOTHING


@pytest.mark.parametrize("asked", [{}, {"kv_calibration": False}, {"kv_calibration_size": 0}])
def test_without_anything_stored_or_by_pages_nothing_is_reserved(asked: dict[str, Any]) -> None:
    ledger = make_ledger()
    record = admit(ledger, make_request(1000, **{**PAGES, "kv_recall": "pages" if asked else "all"}, **asked))
    assert record is not None and record.recall is None
    assert ledger.in_use["sketch_blocks"] == ledger.in_use["buffer_pages"] == 0


@pytest.mark.parametrize("full", [{"sketches": 7}, {"buffers": 2}])
@pytest.mark.parametrize(("on_full", "mode"), [("full", "full"), ("evict", "evict")])
def test_full_recall_pools_fall_back_and_keep_nothing(full: dict[str, int], on_full: str, mode: str) -> None:
    ledger = make_ledger(**full)
    request = make_request(1000, **PAGES, kv_recall_buffer=3, kv_on_full=on_full)
    record = admit(ledger, request)
    report = report_of(ledger, request)
    assert (report["mode"], report["reason"]) == (mode, "recall_full")
    assert ledger.totals.fallbacks == {"swap_full": 0, "recall_full": 1}
    assert record is None if mode == "full" else record is not None and record.recall is None
    assert ledger.in_use == NOTHING | {"sequences": 1, "state_slots": int(mode == "evict")}


def test_pages_and_bytes_read_by_both_rules() -> None:
    """By pages: what was counted, in whole pages. Everything: every page of a read, bytes of its 900 tokens."""
    for asked, pages, tokens in (({"kv_recall": "pages"}, 5, 5 * 16), ({}, 5 * 57, 5 * 900)):
        ledger = make_ledger()
        request = make_request(1000, kv_budget=100, **asked)
        record = admit(ledger, request)
        assert record is not None
        run_step(ledger, counters_for(record, 5))
        report = report_of(ledger, request)
        assert report["pages_read"] == SHAPE.num_layers * pages
        assert report["bytes_read"] == SHAPE.num_layers * tokens * SHAPE.kv_bytes_per_token
        assert report["layers"]["pages_read"] == [pages] * SHAPE.num_layers
