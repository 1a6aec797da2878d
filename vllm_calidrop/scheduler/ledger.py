"""Who holds which ids: of the pools and the state table, from a request's admission until no step can touch them.

It lives in the scheduler's process (EngineCore). A decision (`admission.py`) is made when a request is admitted and is
final until the request ends or is preempted; it travels to every worker as one SequenceRecord.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.memory import PoolSizes
from vllm_calidrop.records import RecallRecord, SequenceCounters, SequenceRecord, StepRecords
from vllm_calidrop.scheduler.admission import Decision, allowed_hit, decide
from vllm_calidrop.scheduler.full_pool import FullPool
from vllm_calidrop.scheduler.headroom import KVBlocks, must_wait
from vllm_calidrop.scheduler.ids import HeldIds, Ids
from vllm_calidrop.scheduler.living import Living, settings_of
from vllm_calidrop.scheduler.reports import Reports
from vllm_calidrop.scheduler.shape import Shape
from vllm_calidrop.scheduler.totals import Totals
from vllm_calidrop.settings.request import RequestSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Ledger:
    """The admitted requests of one engine and the ids they hold.

    num_slots: size of the calibration state table. prefill_state_limit: bytes that window stashes and column sums of
    all prompts in prefill may take; a prompt that would exceed it waits, unless it is alone.
    """

    def __init__(self, shape: Shape, pools: PoolSizes, num_slots: int, prefill_state_limit: int) -> None:
        self.shape = shape
        self.ids = Ids(pools, num_slots)
        self.prefill_state_limit = prefill_state_limit
        self.totals = Totals(shape)
        self.reports = Reports(self.totals)
        self.full_pool = FullPool(self.totals)
        self._living: dict[str, Living] = {}
        self._pending = StepRecords()
        self._admissions = itertools.count(1)
        self._scheduled_steps = 0
        self._processed_steps = 0
        self._quarantine: deque[tuple[int, HeldIds]] = deque()

    # --- admission ---------------------------------------------------------------------------------------------------

    def is_admitted(self, request: Request) -> bool:
        return request.request_id in self._living

    def allowed_hit(self, request: Request, hit_tokens: int) -> int:
        """How much of a prefix-cache hit the request may use, in tokens; asked before admission."""
        return allowed_hit(settings_of(request), request.num_prompt_tokens, hit_tokens, self.shape)

    def must_wait(self, request: Request, blocks: KVBlocks) -> bool:
        """Whether admitting `request` now could force a preemption later (`headroom.py`)."""
        return must_wait(request, list(self._living.values()), blocks, self.shape, self.prefill_state_limit)

    def admit(self, request: Request) -> bool:
        """Decide, reserve and report; False if the request waits or is refused (`full_pool.py`).

        `cancel` undoes it if vLLM then finds no blocks.
        """
        assert request.request_id not in self._living
        if self.full_pool.is_refused(request):
            return False
        settings = settings_of(request)
        decision = decide(settings, request.num_prompt_tokens, self.shape, self.ids.free, self.ids.sizes)
        if not decision.is_admission:
            self.full_pool.hold(request, decision)
            return False
        record, held = None, None
        if settings is not None and decision.evicted:
            held = self.ids.take(decision.needs)
            record = _record(request, next(self._admissions), settings, decision, held)
        params = request.sampling_params
        self.reports.open(request.request_id, decision, often=params is not None and bool(params.stop))
        self._living[request.request_id] = Living(request, record, held)
        return True

    def confirm(self, request: Request) -> None:
        """The admission stands: tell the workers in this step's records, and count a fallback."""
        record = self._living[request.request_id].record
        if record is not None:
            self._pending.admitted.append(record)
        self.totals.admitted(self.reports[request.request_id])

    def cancel(self, request: Request) -> None:
        held = self._living.pop(request.request_id).held
        if held is not None:
            self.ids.give_back(held)

    def first_block_of(self, request_id: str) -> int | None:
        """g of a sequence that is or will be compacted, else None."""
        living = self._living.get(request_id)
        return living.first_block if living and living.record else None

    # --- life --------------------------------------------------------------------------------------------------------

    def take_freeable(self) -> list[tuple[str, int]]:
        """(request id, g) of sequences whose compaction step has been processed, each once."""
        freeable = []
        for request_id, living in self._living.items():
            if living.record is not None and not living.freed and living.is_compacted:
                living.freed = True
                self.totals.compacted(living.record, self.reports[request_id])
                self.totals.kv_blocks_freed += living.first_block
                freeable.append((request_id, living.first_block))
        return freeable

    def release(self, request_id: str) -> None:
        """The sequence ended or was preempted. Its ids wait until no step in flight can touch them."""
        living = self._living.pop(request_id, None)
        if living is None or living.record is None or living.held is None:
            return
        if not living.freed and living.is_compacted:
            self.totals.compacted(living.record, self.reports[request_id])
        if living.record in self._pending.admitted:
            self._pending.admitted.remove(living.record)
        else:
            self._pending.released.append(request_id)
        if self._scheduled_steps > self._processed_steps:
            self._quarantine.append((self._scheduled_steps, living.held))
        else:
            self.ids.give_back(living.held)

    # --- steps -------------------------------------------------------------------------------------------------------

    def step_scheduled(self) -> StepRecords:
        """The records of the step that was just scheduled; called once per schedule."""
        self._scheduled_steps += 1
        records, self._pending = self._pending, StepRecords()
        return records

    def step_processed(self, counters: dict[str, SequenceCounters]) -> None:
        """A step's output came back; called once per step, in order, before vLLM processes it."""
        self._processed_steps += 1
        while self._quarantine and self._quarantine[0][0] <= self._processed_steps:
            self.ids.give_back(self._quarantine.popleft()[1])
        for request_id, counted in counters.items():
            living = self._living.get(request_id)
            if living and living.record and living.record.admission == counted.admission:
                self.reports.count(request_id, counted)

    def forget(self, alive: Any) -> None:
        """Drop what is known of requests that vLLM no longer knows (`alive`: a container of request ids)."""
        self.reports.forget(alive)
        self.full_pool.forget(alive)

    def sequences(self) -> list[dict[str, Any]]:
        """The admitted requests as plain data (docs/server.md)."""
        return [living.shown(self.reports[request_id]) for request_id, living in self._living.items()]

    @property
    def in_use(self) -> dict[str, int]:
        """What is not free; all zero when no request lives."""
        return {"sequences": len(self._living), "quarantine": len(self._quarantine), **self.ids.in_use}


def _record(
    request: Request, admission: int, settings: RequestSettings, decision: Decision, held: HeldIds
) -> SequenceRecord:
    recall = RecallRecord(
        theta=settings.kv_recall_theta,
        eps=settings.kv_recall_eps,
        top_p=settings.kv_recall_top_p,
        most=settings.kv_recall_pages,
        sketch_blocks=held.sketch_blocks,
        buffer_ids=held.buffer_pages,
        rest=settings.kv_recall_rest,
    )
    return SequenceRecord(
        request_id=request.request_id,
        admission=admission,
        slot=held.slots[0],
        prompt_len=decision.prompt_len,
        compaction_point=request.num_tokens,
        budget=decision.kept,
        first_block=decision.first_block,
        view_start=decision.view_start,
        policy=settings.kv_policy,
        window=settings.kv_window,
        sinks=settings.kv_sinks,
        pool_kernel=settings.kv_pool_kernel,
        theta1=settings.kv_theta1,
        theta2=settings.kv_theta2,
        gate=int(Gate.of(settings.kv_gate)),
        stored=decision.stored,
        swap_blocks=held.swap_blocks,
        recall=recall if decision.by_pages else None,
        codec=settings.kv_codec,
        most_reads=decision.most_reads,
    )
