"""The one place that decides: which sequences are compacted, where their evicted KV goes, and when ids are free again.

It lives in the scheduler's process (EngineCore). A decision is made when a request is admitted and is final until the
request ends or is preempted; it travels to every worker as one SequenceRecord.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.algorithm.placement import first_kept_block, view_start
from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.layout import swap_blocks_for
from vllm_calidrop.evicted.pool import SwapLedger
from vllm_calidrop.memory import PoolSizes
from vllm_calidrop.records import RecallRecord, SequenceCounters, SequenceRecord, StepRecords
from vllm_calidrop.scheduler.full_pool import FullPool, Refusal
from vllm_calidrop.scheduler.growth import certain_outputs, most_blocks
from vllm_calidrop.scheduler.reports import Report, Shape, kept_whole
from vllm_calidrop.scheduler.totals import Totals
from vllm_calidrop.settings.request import RECORD_KEY, RequestSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class _Admitted:
    request: Request
    record: SequenceRecord | None
    freed: bool = False


class Ledger:
    """Decisions, pool blocks and state slots of one engine.

    num_slots: size of the calibration state table. prefill_state_limit: bytes that window stashes and H2O column sums
    of all prompts in prefill may take; a prompt that would exceed it waits, unless it is alone.
    """

    def __init__(self, shape: Shape, pools: PoolSizes, num_slots: int, prefill_state_limit: int) -> None:
        self.shape = shape
        self.swap = SwapLedger(pools.swap_blocks)
        self.sketches = SwapLedger(pools.sketch_blocks)
        self.buffers = SwapLedger(pools.buffer_pages)
        self.num_slots = num_slots
        self.prefill_state_limit = prefill_state_limit
        self.totals = Totals(shape)
        self.full_pool = FullPool(self.totals)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._admitted: dict[str, _Admitted] = {}
        self._reports: dict[str, Report] = {}
        self._pending = StepRecords()
        self._admissions = itertools.count(1)
        self._scheduled_steps = 0
        self._processed_steps = 0
        self._quarantine: deque[tuple[int, SequenceRecord]] = deque()

    # --- admission ---------------------------------------------------------------------------------------------------

    def is_admitted(self, request: Request) -> bool:
        return request.request_id in self._admitted

    def allowed_hit(self, request: Request, hit_tokens: int) -> int:
        """How much of a prefix-cache hit the request may use, in tokens; asked before admission."""
        settings = settings_of(request)
        if settings is None or not _wants_eviction(settings, request.num_prompt_tokens):
            return hit_tokens
        assert settings.kv_budget is not None
        return POLICIES[settings.kv_policy].allowed_hit(
            hit_tokens, request.num_prompt_tokens, settings.kv_budget, settings.kv_window, self.shape.block_size
        )

    def must_wait(
        self, request: Request, needed_blocks: int, free_blocks: int, held_blocks: dict[str, int], chunk: int
    ) -> bool:
        """Whether admitting `request` now could force a preemption later, while its prompt is still uncompressed.

        Headroom is kept for what other prompts in prefill have yet to allocate and for what decoding sequences will
        grow by while this prompt is computed: in steps of at most `chunk` tokens, of which every sequence may take one
        and older prompts come first. Without any budget in sight vLLM's own rule stands alone.
        """
        settings = settings_of(request)
        compresses = settings is not None and _wants_eviction(settings, request.num_prompt_tokens)
        others = list(self._admitted.values())
        if not others or not (compresses or any(other.record for other in others)):
            return False
        bs = self.shape.block_size
        headroom = 0
        to_compute = request.num_tokens + sum(
            max(0, o.request.num_tokens - o.request.num_computed_tokens) for o in others
        )
        steps = -(-to_compute // max(1, chunk - len(others)))
        for other in others:
            missing = -(-other.request.num_tokens // bs) - held_blocks.get(other.request.request_id, 0)
            headroom += max(0, missing) + -(-steps // bs)
        if needed_blocks + headroom > free_blocks:
            return True
        prefilling = [o.record for o in others if o.record and _in_prefill(o)]
        used = sum(self._prefill_state_bytes(record.policy, record.window, record.prompt_len) for record in prefilling)
        if not compresses or not prefilling:
            return False
        assert settings is not None
        mine = self._prefill_state_bytes(settings.kv_policy, settings.kv_window, request.num_prompt_tokens)
        return used + mine > self.prefill_state_limit

    def outgrows(self, request: Request, pool_blocks: int) -> bool:
        """Whether outputs that are certain to come would not fit beside each other if `request` were admitted now, each
        prompt at its compressed size: somebody would be preempted, and computed again. Asked where somebody compresses.
        """
        others = [admitted.request for admitted in self._admitted.values()]
        first_blocks = [self.first_block_of(other.request_id) or 0 for other in others]
        mine = self._first_block_if_admitted(request)
        if not others or not (mine or any(first_blocks)):
            return False
        requests, bs = [*others, request], self.shape.block_size
        held = [r.num_tokens - first * bs for r, first in zip(requests, [*first_blocks, mine], strict=True)]
        return most_blocks(held, [certain_outputs(r) for r in requests], bs) > pool_blocks

    def _first_block_if_admitted(self, request: Request) -> int:
        settings = settings_of(request)
        if settings is None or settings.kv_budget is None or not _wants_eviction(settings, request.num_prompt_tokens):
            return 0
        return first_kept_block(request.num_prompt_tokens, settings.kv_budget, self.shape.block_size)

    def admit(self, request: Request) -> bool:
        """Decide, reserve and report; False if the request waits or is refused (cache/full_pool.py).

        `cancel` undoes it if vLLM then finds no blocks.
        """
        assert request.request_id not in self._admitted
        decided = None if self.full_pool.is_refused(request) else self._decide(request)
        if decided is None:
            return False
        record, report = decided
        earlier = self._reports.get(request.request_id)
        if earlier is not None:
            report.earlier, report.earlier_bytes = earlier.counts, earlier.bytes_read
            report.counted, report.compacted = earlier.counted, earlier.compacted
        self._reports[request.request_id] = report
        self._admitted[request.request_id] = _Admitted(request, record)
        return True

    def confirm(self, request: Request) -> None:
        """The admission stands: tell the workers in this step's records, and count a fallback."""
        record = self._admitted[request.request_id].record
        if record is not None:
            self._pending.admitted.append(record)
        self.totals.admitted(self._reports[request.request_id])

    def cancel(self, request: Request) -> None:
        record = self._admitted.pop(request.request_id).record
        if record is not None:
            self._return_ids(record)

    def first_block_of(self, request_id: str) -> int | None:
        """g of a sequence that is or will be compacted, else None."""
        admitted = self._admitted.get(request_id)
        return admitted.record.first_block if admitted and admitted.record else None

    # --- life --------------------------------------------------------------------------------------------------------

    def take_freeable(self) -> list[tuple[str, int]]:
        """(request id, g) of sequences whose compaction step has been processed, each once."""
        freeable = []
        for request_id, admitted in self._admitted.items():
            record = admitted.record
            if record is None or admitted.freed:
                continue
            if _is_compacted(admitted):
                admitted.freed = True
                self.totals.compacted(record, self._reports[request_id])
                self.totals.kv_blocks_freed += record.first_block
                freeable.append((request_id, record.first_block))
        return freeable

    def release(self, request_id: str) -> None:
        """The sequence ended or was preempted. Its ids wait until no step in flight can touch them."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is None or admitted.record is None:
            return
        record = admitted.record
        if not admitted.freed and _is_compacted(admitted):
            self.totals.compacted(record, self._reports[request_id])
        if record in self._pending.admitted:
            self._pending.admitted.remove(record)
        else:
            self._pending.released.append(request_id)
        if self._scheduled_steps > self._processed_steps:
            self._quarantine.append((self._scheduled_steps, record))
        else:
            self._return_ids(record)

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
            self._return_ids(self._quarantine.popleft()[1])
        for request_id, counted in counters.items():
            report = self._reports.get(request_id)
            admitted = self._admitted.get(request_id)
            if report and admitted and admitted.record and admitted.record.admission == counted.admission:
                report.current, report.told = counted, False

    def news(self, request_id: str, finished: bool) -> dict[str, Any] | None:
        """`report`, unless the API process has it as it is; it gets the last one of a request in any case."""
        report = self._reports.get(request_id)
        if report is None or (report.told and not finished):
            return None
        report.told = True
        return self.report(request_id, finished)

    def report(self, request_id: str, finished: bool) -> dict[str, Any] | None:
        """The report so far; with the counters of every layer once the request is finished."""
        report = self._reports.get(request_id)
        return report.as_dict(with_layers=finished) if report else None

    def forget_reports(self, alive: Any) -> None:
        """Drop reports of requests vLLM no longer knows (`alive`: a container of request ids)."""
        for request_id in [request_id for request_id in self._reports if request_id not in alive]:
            self.totals.ended(self._reports.pop(request_id))
        self.full_pool.forget(alive)

    def refusal_report(self, refusal: Refusal) -> dict[str, Any]:
        """What the API process is told of a request that was refused."""
        report = Report(refusal.prompt_tokens, kept=0, evicted=0, mode="refused", reason=refusal.reason, stored=0)
        return report.as_dict(with_layers=False)

    def reports(self) -> list[Report]:
        """Of the requests that vLLM still knows, waiting ones included that were preempted."""
        return list(self._reports.values())

    def sequences(self) -> list[dict[str, Any]]:
        """The admitted requests as plain data (docs/server.md)."""
        return [_shown(admitted, self._reports[request_id]) for request_id, admitted in self._admitted.items()]

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def in_use(self) -> dict[str, int]:
        """What is not free; all zero when no request lives."""
        return {
            "sequences": len(self._admitted),
            "swap_blocks": self.swap.num_blocks - self.swap.num_free,
            "sketch_blocks": self.sketches.num_blocks - self.sketches.num_free,
            "buffer_pages": self.buffers.num_blocks - self.buffers.num_free,
            "state_slots": self.num_slots - len(self._free_slots),
            "quarantine": len(self._quarantine),
        }

    # --- inside ------------------------------------------------------------------------------------------------------

    def _decide(self, request: Request) -> tuple[SequenceRecord | None, Report] | None:
        prompt_len = request.num_prompt_tokens
        settings = settings_of(request)
        if settings is None or settings.kv_budget is None:
            return None, kept_whole(prompt_len, "no_budget")
        if settings.kv_policy == "full":
            return None, kept_whole(prompt_len, "policy_full")
        if prompt_len <= settings.kv_budget:
            return None, kept_whole(prompt_len, "prompt_within_budget")

        evicted = prompt_len - settings.kv_budget
        stored = _tokens_to_store(settings, evicted)
        reason = None if stored else "calibration_off"
        swap_blocks, recall = self._reserve(settings, stored)
        if swap_blocks is None or (stored and settings.kv_recall == "pages" and recall is None):
            lacking = "swap_full" if swap_blocks is None else "recall_full"
            self.swap.give_back(swap_blocks or ())
            if settings.kv_on_full in ("wait", "reject"):
                self.full_pool.hold(
                    request, lacking, settings.kv_on_full == "reject", self._could_fit(settings, stored)
                )
                return None
            if settings.kv_on_full == "full":
                return None, kept_whole(prompt_len, lacking)
            stored, swap_blocks, reason = 0, (), lacking

        codec, by_pages = self.shape.codec(settings.kv_codec), recall is not None
        read_bytes = codec.page_read_bytes if by_pages else codec.run_bytes(stored)
        record = SequenceRecord(
            request_id=request.request_id,
            admission=next(self._admissions),
            slot=self._free_slots.pop(),
            prompt_len=prompt_len,
            compaction_point=request.num_tokens,
            budget=settings.kv_budget,
            first_block=first_kept_block(prompt_len, settings.kv_budget, self.shape.block_size),
            view_start=view_start(prompt_len, settings.kv_budget, self.shape.block_size),
            policy=settings.kv_policy,
            window=settings.kv_window,
            sinks=settings.kv_sinks,
            pool_kernel=settings.kv_pool_kernel,
            theta1=settings.kv_theta1,
            theta2=settings.kv_theta2,
            gate=int(Gate.of(settings.kv_gate)),
            stored=stored,
            swap_blocks=swap_blocks,
            recall=recall,
            codec=codec.name,
            most_reads=self._most_reads(settings, read_bytes) if stored else None,
        )
        return record, Report(
            prompt_tokens=prompt_len,
            kept=settings.kv_budget,
            evicted=evicted,
            mode="calidrop" if stored else "evict",
            reason=reason,
            stored=stored,
            codec=codec.name if stored else None,
            read_bytes=read_bytes,
            by_pages=by_pages,
        )

    def _most_reads(self, settings: RequestSettings, read_bytes: int) -> int | None:
        """Reads of `read_bytes` that a layer may make in a step on one rank: the budget, split evenly over both."""
        if settings.kv_read_budget is None:
            return None
        return settings.kv_read_budget // (self.shape.num_layers * self.shape.ranks * read_bytes)

    def _reserve(self, settings: RequestSettings, stored: int) -> tuple[tuple[int, ...] | None, RecallRecord | None]:
        """Swap blocks for `stored` tokens, and for recall by pages its sketch and buffer; None for what is lacking."""
        swap_blocks = self.swap.take(self.shape.codec(settings.kv_codec).blocks_for(stored))
        if not swap_blocks or settings.kv_recall != "pages":
            return swap_blocks, None
        sketch_blocks = self.sketches.take(swap_blocks_for(stored))
        if sketch_blocks is None:
            return swap_blocks, None
        buffer_ids = self.buffers.take(settings.kv_recall_buffer)
        if buffer_ids is None:
            self.sketches.give_back(sketch_blocks)
            return swap_blocks, None
        return swap_blocks, RecallRecord(
            theta=settings.kv_recall_theta,
            eps=settings.kv_recall_eps,
            top_p=settings.kv_recall_top_p,
            most=settings.kv_recall_pages,
            sketch_blocks=sketch_blocks,
            buffer_ids=buffer_ids,
        )

    def _could_fit(self, settings: RequestSettings, stored: int) -> bool:
        """Whether empty pools would have room."""
        needed = [(self.swap, self.shape.codec(settings.kv_codec).blocks_for(stored))]
        if settings.kv_recall == "pages":
            needed += [(self.sketches, swap_blocks_for(stored)), (self.buffers, settings.kv_recall_buffer)]
        return all(count <= pool.num_blocks for pool, count in needed)

    def _prefill_state_bytes(self, policy: str, window: int, prompt_len: int) -> int:
        return POLICIES[policy].prefill_bytes(self.shape, window, prompt_len)

    def _return_ids(self, record: SequenceRecord) -> None:
        self.swap.give_back(record.swap_blocks)
        if record.recall is not None:
            self.sketches.give_back(record.recall.sketch_blocks)
            self.buffers.give_back(record.recall.buffer_ids)
        self._free_slots.append(record.slot)


def settings_of(request: Request) -> RequestSettings | None:
    """The complete settings the API process resolved, or None where there are none (pooling requests)."""
    params = request.sampling_params
    raw = params.extra_args.get(RECORD_KEY) if params is not None and params.extra_args else None
    return RequestSettings.from_record(raw) if raw is not None else None


def _wants_eviction(settings: RequestSettings, prompt_len: int) -> bool:
    return settings.compresses and settings.kv_budget is not None and prompt_len > settings.kv_budget


def _tokens_to_store(settings: RequestSettings, evicted: int) -> int:
    if not settings.calibrates:
        return 0
    return evicted if settings.kv_calibration_size is None else min(evicted, settings.kv_calibration_size)


def _is_compacted(admitted: _Admitted) -> bool:
    """Whether the step that compacts the sequence has been processed."""
    record, request = admitted.record, admitted.request
    assert record is not None
    return request.num_computed_tokens - request.num_in_flight_tokens >= record.compaction_point


def _shown(admitted: _Admitted, report: Report) -> dict[str, Any]:
    request, record = admitted.request, admitted.record
    prefill_end = record.compaction_point if record else request.num_prompt_tokens
    recall = None
    if record and record.calibrated:
        recall = "pages" if record.recall else "all"
    return {
        "request_id": request.request_id,
        "state": "prefill" if request.num_computed_tokens < prefill_end else "decode",
        "prompt_tokens": report.prompt_tokens,
        "outputs": request.num_output_tokens,
        "kept": report.kept,
        "evicted": report.evicted,
        "mode": report.mode,
        "reason": report.reason,
        "policy": record.policy if record else None,
        "recall": recall,
        "swap_blocks": len(record.swap_blocks) if record else 0,
    }


def _in_prefill(admitted: _Admitted) -> bool:
    assert admitted.record is not None
    return admitted.request.num_computed_tokens < admitted.record.compaction_point
