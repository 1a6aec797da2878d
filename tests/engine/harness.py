"""A real vLLM engine inside the test's process, with what the tests need to see: kept sets, ledger, preemptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tests.reference import Result, Settings


@dataclass
class Ask:
    """One request. settings: the `kv_*` names, empty for none."""

    prompt: list[int]
    max_tokens: int = 16
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def reference_settings(self) -> Settings:
        names = {f.name for f in dataclasses.fields(Settings)}
        return Settings(**{name: value for name, value in self.settings.items() if name in names})


# Sampling with which no output is certain to come (padding is never generated), so admission counts on none, and
# sequences outgrow a small pool.
MAY_STOP: dict[str, Any] = {"stop_token_ids": [0]}


@dataclass
class Answer:
    """kept: per layer int64 [KV heads, budget], last compaction. preempted_at: outputs known at each preemption."""

    tokens: list[int]
    report: dict[str, Any] | None
    kept: list[Tensor]
    cached_tokens: int
    preempted_at: list[int]


class Engine:
    """`LLM` with the CALIDROP backend (or another one), fp32 and eager unless told otherwise."""

    _alive: ClassVar[int] = 0

    def __init__(self, model: str, backend: str | None = "CALIDROP", **options: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 1152,
            "max_num_seqs": 48,
            "num_gpu_blocks_override": 2048,
            "disable_log_stats": True,
        }
        if backend is not None:
            defaults["attention_backend"] = backend
        self.llm = LLM(model, **(defaults | options))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.worker = self.core.model_executor.driver_worker.worker
        self._kept: dict[str, dict[int, Tensor]] = {}
        self._preempted: dict[str, list[int]] = {}
        self.max_running = 0
        if backend == "CALIDROP":
            self.worker.calidrop.on_compaction = self._on_compaction
        self._watch_preemptions()
        Engine._alive += 1

    def close(self) -> None:
        """Shutting down ends the process groups that all engines of a process share: the last one does it."""
        Engine._alive -= 1
        if Engine._alive == 0:
            self.core.shutdown()

    def submit(self, request_id: str, ask: Ask, **sampling: Any) -> None:
        from vllm import SamplingParams

        options: dict[str, Any] = {"temperature": 0, "max_tokens": ask.max_tokens, "ignore_eos": True}
        params = SamplingParams(**(options | sampling), extra_args=dict(ask.settings) or None)
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(ask.prompt)}, params)

    def steps(self) -> Iterator[list[Any]]:
        """Run until nothing is left; yields each step's RequestOutputs."""
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            outputs = engine.step()
            self.max_running = max(self.max_running, len(self.scheduler.running))
            yield outputs
        self.drain()

    def drain(self) -> None:
        """Let the engine tell its workers what ended last."""
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            self.core.step_fn()

    def ask(self, asks: Sequence[Ask], **sampling: Any) -> list[Answer]:
        """All requests at once; answers in their order."""
        self._kept.clear()
        self._preempted.clear()
        self.max_running = 0
        finished: dict[str, Any] = {}
        for index, ask in enumerate(asks):
            self.submit(f"ask{index}", ask, **sampling)
        for outputs in self.steps():
            finished |= {output.request_id: output for output in outputs if output.finished}
        return [self._answer(f"ask{index}", finished[f"ask{index}"]) for index in range(len(asks))]

    def ask_alone(self, asks: Sequence[Ask]) -> list[Answer]:
        return [self.ask([ask])[0] for ask in asks]

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def assert_nothing_in_use(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # the null block is never free
        assert not self.scheduler.requests
        if hasattr(self.scheduler, "calidrop"):
            assert set(self.scheduler.calidrop.in_use.values()) == {0}, self.scheduler.calidrop.in_use
            assert len(self.worker.calidrop.sequences) == 0

    def _answer(self, request_id: str, output: Any) -> Answer:
        # vLLM's internal ids begin with the caller's.
        kept = next((k for i, k in self._kept.items() if i.startswith(f"{request_id}-") or i == request_id), {})
        preempted = next(
            (p for i, p in self._preempted.items() if i.startswith(f"{request_id}-") or i == request_id), []
        )
        completion = output.outputs[0]
        return Answer(
            tokens=list(completion.token_ids),
            report=getattr(completion, "calidrop", None),
            kept=[kept[layer] for layer in sorted(kept)],
            cached_tokens=output.num_cached_tokens or 0,
            preempted_at=preempted,
        )

    def _on_compaction(self, record: Any, layer: int, selection: Any) -> None:
        self._kept.setdefault(record.request_id, {})[layer] = selection.kept.clone()

    def _watch_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def watched(request: Any, *args: Any, **kwargs: Any) -> None:
            self._preempted.setdefault(request.request_id, []).append(request.num_output_tokens)
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = watched


# Where the reference itself stood this close to another outcome, fp32 rounding may decide (design: truths 3 to 5).
# A score is a sum of exponentials of logits. In float32 a logit of 35, as sharp heads here have, is rounded by up to
# 2e-6, and its terms more: scores of either operator were off float64's by up to 8e-6 of themselves.
RHO_MARGIN, SCORE_MARGIN, LOGIT_MARGIN = 1e-4, 1e-5, 1e-4
# A scale of the sketch may round to the next float16, which moves an estimated logit of 10 by 0.005.
SHARE_MARGIN = 0.01
EXCEPTED_SHARE = 0.02


def too_close(result: Result) -> bool:
    margins = result.margins
    return (
        margins.rho < RHO_MARGIN
        or margins.share < SHARE_MARGIN
        or margins.score < SCORE_MARGIN
        or margins.logit < LOGIT_MARGIN
    )


def difference(ask: Ask, answer: Answer, expected: Result) -> str | None:
    """What differs between engine and reference in tokens or in counts per layer. None if nothing."""
    if answer.tokens != expected.tokens:
        return f"tokens {answer.tokens} != {expected.tokens}"
    report = answer.report
    assert report is not None
    if (report["kept"], report["evicted"]) != (expected.kept_count, expected.evicted_count):
        return f"counts {report} != {expected.kept_count}, {expected.evicted_count}"
    if expected.evicted_count:
        for name in ("recomputes", "merges", "plain", "group_reads", "pages_read", "skipped"):
            if report["layers"][name] != getattr(expected, name):
                return f"{name} {report['layers'][name]} != {getattr(expected, name)}"
    return None


def misplaced(answer: Answer, expected: Result) -> int:
    """Largest number of tokens, over layers and KV heads, that the reference keeps and the engine does not."""
    if not expected.evicted_count:
        return 0
    assert len(answer.kept) == len(expected.kept)
    return max(
        len(set(wanted.tolist()) - set(kept.tolist()))
        for kept_layer, wanted_layer in zip(answer.kept, expected.kept, strict=True)
        for kept, wanted in zip(kept_layer, wanted_layer, strict=True)
    )


# Sharp attention gives tied scores: tokens that only they themselves attend to (H2O), or nobody does (SnapKV, sums
# that underflow). Which of them stay is rounding's choice. With more such prompts the check of kept sets would be thin.
TIED_SHARE = 0.25


def assert_equal_to_reference(asks: Sequence[Ask], answers: Sequence[Answer], expected: Sequence[Result]) -> None:
    """Every answer equals the reference: tokens, counts per layer, kept sets.

    But for prompts it calls too close, which are listed: at most 2 % differ in tokens or counts; kept sets may differ,
    with the same tokens and counts, where the reference's own scores at the budget's edge are tied.
    """
    excepted, ties, wrong, tied = [], [], [], set()
    for index, (ask, answer, result) in enumerate(zip(asks, answers, expected, strict=True)):
        what, moved = difference(ask, answer, result), misplaced(answer, result)
        shown = what or f"{moved} kept tokens"
        label = f"#{index} prompt {len(ask.prompt)} {ask.settings}: {shown} ({result.margins})"
        if what is not None:
            (excepted if too_close(result) else wrong).append(label)
        elif moved:
            (ties if result.margins.score < SCORE_MARGIN else wrong).append(label)
            tied.add(_selection(ask))
    assert not wrong, "\n".join(wrong)
    if excepted or ties:
        print("the reference was too close:", *excepted, *ties, sep="\n  ")
    assert len(excepted) <= max(1, EXCEPTED_SHARE * len(asks)), excepted
    assert len(tied) <= max(1, TIED_SHARE * len({_selection(ask) for ask in asks})), ties


def _selection(ask: Ask) -> tuple[Any, ...]:
    """What decides which tokens stay: asks that share it are tied together."""
    names = ("kv_policy", "kv_budget", "kv_window", "kv_sinks", "kv_pool_kernel")
    return (tuple(ask.prompt), *(ask.settings.get(name) for name in names))
