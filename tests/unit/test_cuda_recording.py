"""Replays what vLLM's model runners handed to the CUDA builder: `recordings/*.json`, each from one run of an engine.

The recordings say where they were made (`about`). `v1_cpu.json` and `v2_cpu.json` are of the two runners on CPU under
Triton's interpreter (tests/engine/cuda_identity.py); those of a GPU come from benchmarks/kernels/record_metadata.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.support.workers import CPU, cuda_worker
from vllm_calidrop.attention.cuda import CaliDropCudaMetadataBuilder
from vllm_calidrop.memory import ModelShape
from vllm_calidrop.records import SequenceRecord, StepRecords
from vllm_calidrop.scheduler.spec import CaliDropSpec
from vllm_calidrop.worker.worker import step_of

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))
NUM_SLOTS, MAX_LEN = 64, 2048


def test_there_is_a_recording() -> None:
    assert {"v1_cpu", "v2_cpu"} <= {path.stem for path in RECORDINGS}


class Replay:
    """A worker and a builder that are taken through a recording."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.block_size = about["block_size"]
        shape = ModelShape(1, 4, 2, 64, torch.float32, MAX_LEN)
        self.worker = cuda_worker(shape, num_slots=NUM_SLOTS, swap_blocks=0, max_rows=about["max_rows"])
        self.mode = CUDAGraphMode.NONE
        layer = SimpleNamespace(impl=SimpleNamespace(worker=self.worker, num_heads=4))
        self.compilation = SimpleNamespace(static_forward_context={"a": layer}, cudagraph_mode=self.mode)
        config: Any = SimpleNamespace(
            compilation_config=self.compilation,
            model_config=SimpleNamespace(
                get_num_attention_heads=lambda parallel: 4,
                get_num_kv_heads=lambda parallel: 2,
                get_head_size=lambda: 64,
                rswa_window=None,
            ),
            parallel_config=None,
        )
        spec = CaliDropSpec(block_size=self.block_size, num_kv_heads=2, head_size=64, dtype=torch.float32)
        self.builder = CaliDropCudaMetadataBuilder(spec, ["a"], config, CPU)

    def build(self, step: dict[str, Any]) -> Any:
        admitted = [
            SequenceRecord(**record | {"swap_blocks": tuple(record["swap_blocks"])}) for record in step["admitted"]
        ]
        self.worker.begin_step(StepRecords(step["released"], admitted), step["request_ids"])
        runner: Any = self.worker.runner
        runner.req_states = SimpleNamespace(index_to_req_id=dict(enumerate(step["request_ids"])))
        self.compilation.cudagraph_mode = CUDAGraphMode.FULL if step["replays_graphs"] else CUDAGraphMode.NONE

        def int32(name: str) -> torch.Tensor:
            return torch.tensor(step[name], dtype=torch.int32)

        cam = CommonAttentionMetadata(
            query_start_loc=int32("query_start_loc"),
            query_start_loc_cpu=int32("query_start_loc_cpu"),
            seq_lens=int32("seq_lens"),
            seq_lens_cpu_upper_bound=int32("seq_lens_cpu_upper_bound"),
            num_reqs=step["num_reqs"],
            num_actual_tokens=step["num_actual_tokens"],
            max_query_len=step["max_query_len"],
            max_seq_len=max(step["seq_lens"]),
            block_table_tensor=int32("block_table"),
            slot_mapping=torch.tensor(step["slot_mapping"]),
            req_idx=np.arange(len(step["request_ids"])),
        )
        with step_of(self.worker):
            return self.builder.build(0, cam)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_builder_makes_of_it_what_it_made(path: Path) -> None:
    recording = json.loads(path.read_text())
    replay = Replay(recording["about"])
    ours = chunks = 0
    for step in recording["steps"]:
        metadata = replay.build(step)
        if metadata.decode is not None or step["replays_graphs"]:
            assert replay.worker.step.table[:, : step["num_reqs"]].tolist() == step["step_table"]
        prefills = [[row.first_token, row.done, row.length, row.completes] for row in metadata.prefills]
        assert prefills == step["prefills"]
        assert (metadata.stock is not None, metadata.decode is not None) == (step["stock"], step["decode"])
        ours, chunks = ours + (metadata.decode is not None), chunks + len(prefills)
    assert ours and chunks


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_what_the_builder_relies_on(path: Path) -> None:
    """vLLM's host lengths are the device's, slots follow from positions and block table, padding has no tokens."""
    recording = json.loads(path.read_text())
    block_size = recording["about"]["block_size"]
    sequences: dict[str, dict[str, Any]] = {}
    for step in recording["steps"]:
        sequences |= {record["request_id"]: record for record in step["admitted"]}
        rows = len(step["request_ids"])
        starts, lens = step["query_start_loc"], step["seq_lens"]
        assert starts == step["query_start_loc_cpu"]
        assert lens[:rows] == step["seq_lens_cpu_upper_bound"][:rows]
        assert set(lens[rows:]) <= {0} and set(starts[rows:]) <= {starts[rows]}, "padding has no tokens"
        for row, request_id in enumerate(step["request_ids"]):
            length = starts[row + 1] - starts[row]
            for token in range(length):
                position = lens[row] - length + token
                block = step["block_table"][row][position // block_size]
                assert step["slot_mapping"][starts[row] + token] == block * block_size + position % block_size
            record = sequences.get(request_id)
            mine = record is not None and lens[row] - length >= record["compaction_point"]
            if step["decode"] or step["replays_graphs"]:
                slot, token, end, stock = (column[row] for column in step["step_table"])
                expected = (record["slot"], starts[row], lens[row], 1) if mine and record else (-1, 0, 0, lens[row])
                assert (slot, token, end, stock) == expected
