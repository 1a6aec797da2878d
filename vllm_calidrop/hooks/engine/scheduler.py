"""The scheduler that the configuration ends with, with three methods of ours in front of its own.

`__init__`: the ledger is made beside it and handed to the block manager. `schedule`: the step's records leave with its
output. `update_from_output`: the workers' counters come in, and every request's report goes out with its new tokens
(inside `kv_transfer_params`, the one free-form field that reaches the API process; it is taken out again there).
There, too, a request that the ledger refused is ended.

vLLM has a setting for the scheduler's class, `scheduler_cls`, so nothing is wrapped: when the configuration is complete
(hooks/engine/platform.py), the setting names a class mixed from these methods and the class that would have been used,
which may be vLLM's synchronous or asynchronous one or the user's own. vLLM then warns that a custom scheduler is used
and that it may be slow because it is not asynchronous; the second half does not apply here.
"""

from __future__ import annotations

from typing import Any

from vllm_calidrop.hooks.engine.kv_cache_manager import deciding
from vllm_calidrop.hooks.mixed import Below, Mixture
from vllm_calidrop.hooks.wrap import hook_error
from vllm_calidrop.records import COUNTERS_ATTRIBUTE, MEASURES_ATTRIBUTE, RECORDS_ATTRIBUTE
from vllm_calidrop.settings.request import REPORT_KEY

_SYNCHRONOUS = "vllm.v1.core.sched.scheduler.Scheduler"
_ASYNCHRONOUS = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


class CompressingScheduler(Below):
    """Mixed into a scheduler of vLLM's, which comes after it in the order of classes. calidrop: the ledger."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        from vllm_calidrop.scheduler.build import make_ledger

        self.calidrop = make_ledger(vllm_config, kv_cache_config)
        manager = self.kv_cache_manager
        manager.__class__ = deciding(type(manager))
        manager.calidrop = self.calidrop
        manager.calidrop_chunk = min(
            self.max_num_scheduled_tokens,
            self.scheduler_config.long_prefill_token_threshold or self.max_num_scheduled_tokens,
        )
        for group in manager.coordinator.single_type_managers:
            group.ledger = self.calidrop

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        scheduler_output = super().schedule(*args, **kwargs)
        setattr(scheduler_output, RECORDS_ATTRIBUTE, self.calidrop.step_scheduled())
        return scheduler_output

    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.v1.engine import EngineCoreOutputs

        ledger = self.calidrop
        ledger.step_processed(getattr(model_runner_output, COUNTERS_ATTRIBUTE, {}))
        ledger.totals.measured(getattr(model_runner_output, MEASURES_ATTRIBUTE, None))
        refusals = _end_refused(self, ledger)
        by_client = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        for client, output in refusals:
            by_client.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        for outputs in by_client.values():
            for output in outputs.outputs:
                if output.kv_transfer_params and REPORT_KEY in output.kv_transfer_params:
                    continue  # a refusal
                report = ledger.reports.news(output.request_id, finished=output.finish_reason is not None)
                if report is not None:
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), REPORT_KEY: report}
        ledger.forget(alive=self.requests)
        return by_client


MIXTURE = Mixture(
    __name__,
    CompressingScheduler,
    (_SYNCHRONOUS, _ASYNCHRONOUS),
    {
        "__init__": ("self", "vllm_config", "kv_cache_config"),
        "schedule": ("self",),
        "update_from_output": ("self", "scheduler_output", "model_runner_output"),
    },
)


def __getattr__(name: str) -> Any:
    return MIXTURE.by_name(name)


def use_our_scheduler(vllm_config: Any) -> None:
    """Make `scheduler_cls` name the mixed class, and make that class: what does not fit is an error at once.

    It is called again for a configuration that vLLM rebuilds, whose choice between its own two may have changed.
    """
    config = vllm_config.scheduler_config
    chosen = MIXTURE.base_path(config.scheduler_cls) or config.scheduler_cls
    if chosen is None or chosen in MIXTURE.usual:
        chosen = _ASYNCHRONOUS if config.async_scheduling else _SYNCHRONOUS
    elif config.scheduler_cls is chosen:
        from vllm.utils.import_utils import resolve_obj_by_qualname

        from vllm_calidrop.support import refuse_scheduler

        chosen = resolve_obj_by_qualname(chosen) if isinstance(chosen, str) else chosen
        refuse_scheduler(chosen)
    config.scheduler_cls = MIXTURE.path_of(chosen)
    MIXTURE.by_name(config.scheduler_cls.rpartition(".")[2])


def require_our_scheduler(vllm_config: Any) -> None:
    """HookError unless the configuration names a mixed class: with any other one a budget would be without effect."""
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    if not issubclass(scheduler, CompressingScheduler):
        raise hook_error(f"{scheduler.__module__}.{scheduler.__qualname__} is used without our methods", __name__)


def _end_refused(scheduler: Any, ledger: Any) -> list[tuple[int, Any]]:
    """End the requests that the ledger refused: (client, its only output) each; the report says why."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import RequestStatus

    from vllm_calidrop.scheduler.reports import Report

    ended = []
    for request_id, decision in ledger.full_pool.take_refused().items():
        report = Report.of(decision).as_dict(with_layers=False)
        for request in scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED):
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                kv_transfer_params={REPORT_KEY: report},
            )
            ended.append((request.client_index, output))
    return ended
