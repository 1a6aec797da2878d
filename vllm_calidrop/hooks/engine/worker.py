"""vLLM's worker with four methods of ours in front of its own; both model runners are behind them.

`determine_available_memory`: vLLM gives all memory it finds to the KV pool, and ours must be left over. Its own profile
run never sees our buffers, which are made afterwards and whose untouched pages are not resident. `execute_model`: the
scheduler's records are taken over before the step, and the metadata builder may look at the worker only while a real
step runs (profiling and dummy batches build metadata too). `sample_tokens`: the counters leave with the sampled tokens,
without a synchronisation of their own. `shutdown`: what is pinned is given back before vLLM's own.

vLLM has a setting for the worker's class, `worker_cls`, so nothing is wrapped: when the platform has filled it in
(hooks/engine/platform.py), it names a class mixed from these methods and that one. A user's `worker_extension_cls` is
added to it by vLLM as to any other.
"""

from __future__ import annotations

from typing import Any

from vllm_calidrop.hooks.mixed import Below, Mixture
from vllm_calidrop.hooks.wrap import require_instantiable
from vllm_calidrop.records import COUNTERS_ATTRIBUTE, MEASURES_ATTRIBUTE, records_of


class CompressingWorker(Below):
    """Mixed into a worker of vLLM's. calidrop: our side of it, made once the KV cache exists."""

    calidrop: Any = None

    def calidrop_allocate(self, pools: Any) -> None:
        """Called on every worker by the engine once the KV cache exists (hooks/engine/engine_core.py)."""
        from vllm_calidrop.attention import backend
        from vllm_calidrop.hooks.engine.pending_output import PendingOutput
        from vllm_calidrop.worker.build import make_worker

        ours = backend.CaliDropBackend
        for cls in (PendingOutput, ours, ours.get_builder_cls(), ours.get_impl_cls()):
            require_instantiable(cls)
        self.calidrop = make_worker(self, pools)

    def determine_available_memory(self, *args: Any, **kwargs: Any) -> int:
        from vllm_calidrop.worker.room import leave_room

        available = super().determine_available_memory(*args, **kwargs)
        return leave_room(self.vllm_config, self, available)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.calidrop is None:
            return super().execute_model(scheduler_output, *args, **kwargs)
        from vllm_calidrop.worker.worker import step_of

        self.calidrop.begin_step(records_of(scheduler_output), list(scheduler_output.num_scheduled_tokens))
        with step_of(self.calidrop):
            return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, grammar_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(grammar_output, *args, **kwargs)
        if self.calidrop is None or output is None:
            return output
        owners, counts = self.calidrop.step_counts()
        if not owners:
            return output
        from vllm_calidrop.worker.counters import PendingCounts

        measures = self.calidrop.measures.snapshot()
        return _attach(output, owners, PendingCounts(_sum_over_ranks(counts)), measures)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        ours, self.calidrop = self.calidrop, None
        if ours is not None:
            ours.close()
        super().shutdown(*args, **kwargs)


MIXTURE = Mixture(
    __name__,
    CompressingWorker,
    ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"),
    {
        "determine_available_memory": ("self",),
        "execute_model": ("self", "scheduler_output"),
        "sample_tokens": ("self", "grammar_output"),
        "shutdown": ("self",),
    },
)


def __getattr__(name: str) -> Any:
    return MIXTURE.by_name(name)


def use_our_worker(vllm_config: Any) -> None:
    """Make `worker_cls`, which the platform has filled in, name the mixed class. The workers' processes make it.

    It is called again for a configuration that vLLM rebuilds, which then names a mixed class already.
    """
    config = vllm_config.parallel_config
    if MIXTURE.base_path(config.worker_cls) is None:
        config.worker_cls = MIXTURE.path_of(config.worker_cls)


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
