"""The worker runs steps through two methods, and ends through a third; both model runners are behind them.

`execute_model`: the scheduler's records are taken over before the step, and the metadata builder may look at the worker
only while a real step runs (profiling and dummy batches build metadata too). `sample_tokens`: the counters leave with
the sampled tokens, without a synchronisation of their own. `shutdown`: what is pinned is given back before vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import require_instantiable, require_wraps_in_use, wrap_method
from vllm_calidrop.records import COUNTERS_ATTRIBUTE, MEASURES_ATTRIBUTE, records_of


def install() -> None:
    when_imported("vllm.v1.worker.gpu_worker", _wrap)


def _wrap(module: Any) -> None:
    Worker = module.Worker
    wrap_method(Worker, "execute_model", _run_step, ("self", "scheduler_output"))
    wrap_method(Worker, "sample_tokens", _send_counters, ("self", "grammar_output"))
    wrap_method(Worker, "shutdown", _close_first, ("self",))
    Worker.calidrop = None
    Worker.calidrop_allocate = _allocate


def _allocate(self: Any, pools: Any) -> None:
    """Called on every worker by the engine once the KV cache exists (hooks/engine_core.py)."""
    from vllm_calidrop.attention import backend
    from vllm_calidrop.hooks.engine.pending_output import PendingOutput
    from vllm_calidrop.worker.build import make_worker

    require_wraps_in_use(type(self))
    ours = backend.CaliDropBackend
    for cls in (PendingOutput, ours, ours.get_builder_cls(), ours.get_impl_cls()):
        require_instantiable(cls)
    self.calidrop = make_worker(self, pools)


def _close_first(original: Callable[..., None]) -> Callable[..., None]:
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        ours, self.calidrop = self.calidrop, None
        if ours is not None:
            ours.close()
        original(self, *args, **kwargs)

    return shutdown


def _run_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.calidrop is None:
            return original(self, scheduler_output, *args, **kwargs)
        from vllm_calidrop.worker.worker import step_of

        self.calidrop.begin_step(records_of(scheduler_output), list(scheduler_output.num_scheduled_tokens))
        with step_of(self.calidrop):
            return original(self, scheduler_output, *args, **kwargs)

    return execute_model


def _send_counters(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, grammar_output, *args, **kwargs)
        if self.calidrop is None or output is None:
            return output
        owners, counts = self.calidrop.step_counts()
        if not owners:
            return output
        from vllm_calidrop.worker.counters import PendingCounts

        measures = self.calidrop.measures.snapshot()
        return _attach(output, owners, PendingCounts(_sum_over_ranks(counts)), measures)

    return sample_tokens


def _sum_over_ranks(counts: Any) -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return counts
    # In float32, which every platform's all-reduce takes: exact up to 2^24 decisions of a layer and sequence.
    return group.all_reduce(counts.float()).to(counts.dtype)


def _attach(output: Any, owners: Any, pending: Any, measures: Any) -> Any:
    from vllm.v1.outputs import AsyncModelRunnerOutput

    from vllm_calidrop.worker.worker import counters_of

    def attach(finished: Any) -> None:
        setattr(finished, COUNTERS_ATTRIBUTE, counters_of(owners, pending.wait()))
        setattr(finished, MEASURES_ATTRIBUTE, measures)

    if isinstance(output, AsyncModelRunnerOutput):
        from vllm_calidrop.hooks.engine.pending_output import PendingOutput

        return PendingOutput(output, attach)
    attach(output)
    return output
