"""vLLM's scheduler has no place for a plugin's per-request decisions, so three of its methods are wrapped.

`__init__`: the ledger is made beside it and handed to the block manager. `schedule`: the step's records leave with its
output. `update_from_output`: the workers' counters come in, and every request's report goes out with its new tokens
(inside `kv_transfer_params`, the one free-form field that reaches the API process; it is taken out again there).
There, too, a request that the ledger refused is ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.records import COUNTERS_ATTRIBUTE, MEASURES_ATTRIBUTE, RECORDS_ATTRIBUTE
from vllm_calidrop.selection import is_selected
from vllm_calidrop.settings.request import REPORT_KEY


def install() -> None:
    when_imported("vllm.v1.core.sched.scheduler", _wrap)


def _wrap(module: Any) -> None:
    Scheduler = module.Scheduler
    wrap_method(Scheduler, "__init__", _with_ledger, ("self", "vllm_config", "kv_cache_config"))
    wrap_method(Scheduler, "schedule", _send_records, ("self",))
    wrap_method(
        Scheduler,
        "update_from_output",
        _exchange_reports,
        ("self", "scheduler_output", "model_runner_output"),
    )


def _with_ledger(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, kv_cache_config, *args, **kwargs)
        self.calidrop = None
        if is_selected(vllm_config):
            from vllm_calidrop.scheduler.build import make_ledger

            self.calidrop = make_ledger(vllm_config, kv_cache_config)
            self.kv_cache_manager.calidrop = self.calidrop
            self.kv_cache_manager.calidrop_chunk = min(
                self.max_num_scheduled_tokens,
                self.scheduler_config.long_prefill_token_threshold or self.max_num_scheduled_tokens,
            )
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                manager.ledger = self.calidrop

    return __init__


def _send_records(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler_output = original(self, *args, **kwargs)
        if self.calidrop is not None:
            setattr(scheduler_output, RECORDS_ATTRIBUTE, self.calidrop.step_scheduled())
        return scheduler_output

    return schedule


def _exchange_reports(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.v1.engine import EngineCoreOutputs

    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        ledger = self.calidrop
        if ledger is None:
            return original(self, scheduler_output, model_runner_output, *args, **kwargs)
        ledger.step_processed(getattr(model_runner_output, COUNTERS_ATTRIBUTE, {}))
        ledger.totals.measured(getattr(model_runner_output, MEASURES_ATTRIBUTE, None))
        refusals = _end_refused(self, ledger)
        by_client = original(self, scheduler_output, model_runner_output, *args, **kwargs)
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

    return update_from_output


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
