"""Writes down what vLLM's model runner hands to the CUDA backend's metadata builder, and what the builder makes of it.

A test replays such a recording (tests/unit/test_cuda_recording.py), so what a real runner does on a real device stays a
test after the device is gone. Reading the device's tensors waits for it: not for a server.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_calidrop.attention.cuda import CaliDropCudaMetadataBuilder
from vllm_calidrop.records import SequenceRecord, StepRecords
from vllm_calidrop.worker.worker import CaliDropWorker, active_worker


class MetadataRecorder:
    """Records every step of the engine in this process that has a sequence of ours."""

    def __init__(self, worker: CaliDropWorker) -> None:
        self._worker = worker
        self._records: StepRecords | None = None
        self._seen: dict[str, str] = {}
        self._block_size = 0
        self.steps: list[dict[str, Any]] = []
        begin_step, build = worker.begin_step, CaliDropCudaMetadataBuilder.build

        def recorded_begin(step: StepRecords | None, scheduled: list[str]) -> None:
            self._records = step
            begin_step(step, scheduled)

        def recorded_build(builder: Any, prefix: int, cam: Any, fast_build: bool = False) -> Any:
            metadata = build(builder, prefix, cam, fast_build)
            if active_worker() is worker:
                self._record(builder, cam, metadata)
            return metadata

        worker.begin_step = recorded_begin  # type: ignore[method-assign]
        CaliDropCudaMetadataBuilder.build = recorded_build  # type: ignore[method-assign]

    def save(self, path: Path, **about: Any) -> None:
        about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about |= {"runner": type(self._worker.runner).__module__, "max_rows": self._worker.step.table.shape[1]}
        about["block_size"] = self._block_size
        lines = ",\n".join(json.dumps(step) for step in self.steps)
        path.write_text(f'{{"about": {json.dumps(about)},\n"steps": [\n{lines}\n]}}\n')

    def _record(self, builder: Any, cam: Any, metadata: Any) -> None:
        records = self._records or StepRecords()
        self._records = None
        self._block_size = builder.block_size
        request_ids = self._worker.request_ids(cam)
        columns = -(-int(cam.seq_lens.max()) // builder.block_size)
        self.steps.append(
            {
                "released": [self._short(request_id) for request_id in records.released],
                "admitted": [self._plain(record) for record in records.admitted],
                "request_ids": [self._short(request_id) for request_id in request_ids],
                "num_reqs": cam.num_reqs,
                "num_actual_tokens": cam.num_actual_tokens,
                "max_query_len": cam.max_query_len,
                "query_start_loc": _list(cam.query_start_loc),
                "query_start_loc_cpu": _list(cam.query_start_loc_cpu),
                "seq_lens": _list(cam.seq_lens),
                "seq_lens_cpu_upper_bound": _list(cam.seq_lens_cpu_upper_bound),
                "slot_mapping": _list(cam.slot_mapping[: cam.num_actual_tokens]),
                "block_table": _list(cam.block_table_tensor[: cam.num_reqs, :columns]),
                "replays_graphs": builder._replays_graphs,
                "step_table": _list(self._worker.step.table[:, : cam.num_reqs]),
                "prefills": [[row.first_token, row.done, row.length, row.completes] for row in metadata.prefills],
                "stock": metadata.stock is not None,
                "decode": metadata.decode is not None,
            }
        )

    def _plain(self, record: SequenceRecord) -> dict[str, Any]:
        return dataclasses.asdict(record) | {"request_id": self._short(record.request_id)}

    def _short(self, request_id: str) -> str:
        return self._seen.setdefault(request_id, f"r{len(self._seen)}")


def _list(tensor: Tensor) -> list[Any]:
    return tensor.cpu().tolist()
