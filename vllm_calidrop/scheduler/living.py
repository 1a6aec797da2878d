"""A request that is admitted, and the settings that came with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_calidrop.records import SequenceRecord
from vllm_calidrop.scheduler.ids import HeldIds
from vllm_calidrop.scheduler.reports import Report
from vllm_calidrop.settings.request import RECORD_KEY, RequestSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request

_SETTINGS = "calidrop_settings"


def settings_of(request: Request) -> RequestSettings | None:
    """The complete settings the API process resolved, or None where there are none (pooling requests).

    They are parsed when they are first asked for and kept on the request, so they live as long as it does.
    """
    if not hasattr(request, _SETTINGS):
        params = request.sampling_params
        raw = params.extra_args.get(RECORD_KEY) if params is not None and params.extra_args else None
        setattr(request, _SETTINGS, RequestSettings.from_record(raw) if raw is not None else None)
    settings: RequestSettings | None = getattr(request, _SETTINGS)
    return settings


@dataclass
class Living:
    """record, held: None where nothing is evicted. freed: its blocks below g have been given back."""

    request: Request
    record: SequenceRecord | None
    held: HeldIds | None
    freed: bool = False

    @property
    def first_block(self) -> int:
        """g, 0 where nothing is evicted."""
        return self.record.first_block if self.record else 0

    @property
    def in_prefill(self) -> bool:
        """Whether the worker still holds what the policy needs of its prompt."""
        return self.record is not None and self.request.num_computed_tokens < self.record.compaction_point

    @property
    def is_compacted(self) -> bool:
        """Whether the step that compacts it has been processed."""
        done = self.request.num_computed_tokens - self.request.num_in_flight_tokens
        return self.record is not None and done >= self.record.compaction_point

    def shown(self, report: Report) -> dict[str, Any]:
        """The sequence as plain data (docs/server.md)."""
        request, record = self.request, self.record
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
