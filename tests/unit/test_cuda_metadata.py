"""The CUDA builder on vLLM's own V2 buffers and dataclasses, over CPU tensors: which rows are ours, padding, graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.utils import AttentionGroup

from tests.support.workers import CPU, cuda_worker
from vllm_calidrop.algorithm.placement import first_kept_block, view_start
from vllm_calidrop.attention.cuda import CaliDropCudaBackend, CaliDropCudaMetadataBuilder
from vllm_calidrop.attention.rows import CaliDropMetadata
from vllm_calidrop.hooks.engine import cudagraphs
from vllm_calidrop.hooks.wrap import original_of
from vllm_calidrop.memory import ModelShape
from vllm_calidrop.ops.registry import CHOICE_VARIABLE
from vllm_calidrop.records import SequenceRecord, StepRecords
from vllm_calidrop.scheduler.spec import CaliDropSpec
from vllm_calidrop.worker.step import StepTable
from vllm_calidrop.worker.worker import step_of

BLOCK_SIZE, MAX_ROWS, MAX_TOKENS, MAX_LEN = 16, 8, 64, 256
LAYER = "model.layers.0.attn"


def record(request_id: str, slot: int, prompt: int, budget: int, known: int | None = None) -> SequenceRecord:
    return SequenceRecord(
        request_id=request_id,
        admission=slot + 1,
        slot=slot,
        prompt_len=prompt,
        compaction_point=known or prompt,
        budget=budget,
        first_block=first_kept_block(prompt, budget, BLOCK_SIZE),
        view_start=view_start(prompt, budget, BLOCK_SIZE),
        policy="streaming_llm",
        window=1,
        sinks=0,
        pool_kernel=1,
        theta1=0.25,
        theta2=0.75,
        gate=1,
        stored=prompt - budget,
        swap_blocks=(3, 4),
    )


class Engine:
    """V2's buffers, a builder and a worker; `requests` are (id, tokens done, tokens scheduled), in batch order."""

    def __init__(self, mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> None:
        self.states = SimpleNamespace(index_to_req_id={}, req_id_to_index={}, num_computed_tokens_np=np.zeros(32, int))
        shape = ModelShape(1, 4, 2, 64, torch.float32, MAX_LEN)
        runner = SimpleNamespace(req_states=self.states)
        self.worker = cuda_worker(shape, runner=runner, max_rows=MAX_ROWS)
        layer = SimpleNamespace(impl=SimpleNamespace(worker=self.worker, num_heads=4))
        config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(
                static_forward_context={LAYER: layer}, cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8]
            ),
            model_config=SimpleNamespace(
                get_num_attention_heads=lambda parallel: 4,
                get_num_kv_heads=lambda parallel: 2,
                get_head_size=lambda: 64,
                rswa_window=None,
            ),
            parallel_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS),
        )
        spec = CaliDropSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32)
        self.builder = CaliDropCudaMetadataBuilder(spec, [LAYER], config, CPU)
        group = AttentionGroup(CaliDropCudaBackend, [LAYER], spec, 0, metadata_builders=[self.builder])
        self._groups = [[group]]
        self._kv_cache_config: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
        self.buffers = InputBuffers(MAX_ROWS, MAX_TOKENS, CPU)
        self.block_table = torch.arange(MAX_ROWS * 16, dtype=torch.int32).view(MAX_ROWS, 16)
        self.slot_mapping = torch.full((1, MAX_TOKENS), -1)
        self.layer = layer

    def run(
        self, requests: list[tuple[str, int, int]], admitted: tuple[SequenceRecord, ...] = (), padded: int | None = None
    ) -> CaliDropMetadata:
        """One step as V2's `prepare_inputs` and `prepare_attn` hand it to the builder; padded: rows of its graph."""
        for index, (request_id, done, _) in enumerate(requests, start=7):
            self.states.index_to_req_id[index] = request_id
            self.states.req_id_to_index[request_id] = index
            self.states.num_computed_tokens_np[index] = done
        rows, all_rows = len(requests), padded or len(requests)
        lengths = np.array([length for _, _, length in requests], dtype=np.int32)
        num_tokens = int(lengths.sum())
        starts = np.empty(MAX_ROWS + 1, dtype=np.int32)
        starts[0] = 0
        np.cumsum(lengths, out=starts[1 : rows + 1])
        starts[rows + 1 :] = num_tokens
        self.buffers.query_start_loc.copy_(torch.from_numpy(starts))
        upper = np.zeros(all_rows, dtype=np.int32)
        upper[:rows] = [done + length for _, done, length in requests]
        self.buffers.seq_lens.zero_()
        self.buffers.seq_lens[:rows] = torch.from_numpy(upper[:rows])
        self.worker.begin_step(StepRecords([], list(admitted)), [request_id for request_id, *_ in requests])
        with step_of(self.worker):
            return self._build(
                all_rows, padded or num_tokens, starts, int(lengths.max()), torch.from_numpy(upper), rows, False
            )

    def capture(self, rows: int) -> CaliDropMetadata:
        batch = InputBatch.make_dummy(rows, rows, self.buffers, max_query_len=1)
        return self._build(rows, rows, batch.query_start_loc_np, 1, batch.seq_lens_cpu_upper_bound, rows, True)

    def _build(
        self, rows: int, tokens: int, starts: np.ndarray, longest: int, upper: torch.Tensor, real: int, capture: bool
    ) -> CaliDropMetadata:
        metadata: CaliDropMetadata = build_attn_metadata(
            attn_groups=self._groups,
            num_reqs=rows,
            num_tokens=tokens,
            query_start_loc_gpu=self.buffers.query_start_loc[: rows + 1],
            query_start_loc_cpu=torch.from_numpy(starts[: rows + 1]),
            max_query_len=longest,
            seq_lens=self.buffers.seq_lens,
            max_seq_len=MAX_LEN,
            block_tables=(self.block_table[:rows],),
            slot_mappings=self.slot_mapping[:, :tokens],
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=upper,
            for_cudagraph_capture=capture,
            req_idx=np.arange(7, 7 + real),
        )[LAYER]
        return metadata


def test_rows_of_a_mixed_batch() -> None:
    """A decode of ours behind a prompt chunk, a plain decode and a plain chunk: the batch stays whole."""
    engine = Engine(CUDAGraphMode.PIECEWISE)
    mine, prompt = record("mine", slot=5, prompt=100, budget=30), record("prompt", slot=2, prompt=90, budget=20)
    engine.run([("mine", 0, 64)], (mine,))
    metadata = engine.run([("prompt", 64, 26), ("plain", 40, 1), ("mine", 103, 1), ("chunk", 0, 10)], (prompt,))
    assert metadata.decode is not None and metadata.stock is not None
    assert metadata.decode.slot.tolist() == [-1, -1, 5, -1]
    assert metadata.decode.token.tolist() == [0, 0, 27, 0]
    assert metadata.decode.end.tolist() == [0, 0, 104, 0]
    assert metadata.stock.seq_lens.tolist() == [90, 41, 1, 10]
    assert metadata.stock.query_start_loc.tolist() == [0, 26, 27, 28, 38]
    assert metadata.decode.block_table.data_ptr() == engine.block_table.data_ptr()
    (chunk,) = metadata.prefills
    assert (chunk.first_token, chunk.done, chunk.length, chunk.completes) == (0, 64, 26, True)
    assert chunk.blocks.tolist() == engine.block_table[0].tolist()
    assert engine.buffers.seq_lens[:4].tolist() == [90, 41, 104, 10], "vLLM's own lengths are left alone"


def test_batches_that_need_only_one_operator() -> None:
    engine = Engine(CUDAGraphMode.PIECEWISE)
    stock = engine.run([("plain", 3, 1), ("other", 0, 5)])
    assert stock.decode is None and stock.stock is not None
    assert stock.stock.seq_lens.data_ptr() == engine.buffers.seq_lens.data_ptr(), "vLLM's metadata as it is"
    engine.run([("mine", 0, 64)], (record("mine", slot=0, prompt=64, budget=30),))
    ours = engine.run([("mine", 64, 1)])
    assert ours.stock is None and ours.decode is not None
    assert (ours.decode.slot.tolist(), ours.decode.end.tolist()) == ([0], [65])


def test_a_captured_batch_is_replayed_with_other_rows_and_padding() -> None:
    """What a graph has recorded are addresses: after each build they hold the batch of that step."""
    engine = Engine()
    captured = engine.capture(4)
    assert captured.stock is not None and captured.decode is not None and not captured.prefills
    assert captured.decode.end.tolist() == [0] * 4 and captured.stock.seq_lens.tolist() == [1] * 4
    engine.run([("a", 0, 40)], (record("a", slot=1, prompt=40, budget=10),))
    engine.run([("b", 0, 50)], (record("b", slot=3, prompt=50, budget=16),))

    addresses = [tensor.data_ptr() for tensor in captured.decode]
    engine.run([("plain", 20, 1), ("b", 50, 1), ("a", 44, 1)], padded=4)
    assert addresses == [tensor.data_ptr() for tensor in engine.worker.step.rows(4, engine.block_table)]
    assert captured.decode.slot.tolist() == [-1, 3, 1, -1]
    assert captured.decode.token.tolist() == [0, 1, 2, 0]
    assert captured.decode.end.tolist() == [0, 51, 45, 0]
    assert captured.stock.seq_lens.tolist() == [21, 1, 1, 0]

    engine.run([("plain", 21, 1)], padded=4)
    assert captured.decode.slot.tolist() == [-1] * 4 and captured.decode.end.tolist() == [0] * 4
    assert captured.stock.seq_lens.tolist() == [22, 0, 0, 0]


def test_batches_outside_a_step_are_plain() -> None:
    """Warm-up and dummy batches build metadata too, with rows that are nobody's."""
    engine = Engine()
    engine.run([("mine", 0, 40)], (record("mine", slot=1, prompt=40, budget=10),))
    engine.run([("mine", 40, 1)])
    batch = InputBatch.make_dummy(2, 2, engine.buffers)
    metadata = engine._build(2, 2, batch.query_start_loc_np, 1, batch.seq_lens_cpu_upper_bound, 2, False)
    assert metadata.decode is None
    assert engine.worker.step.rows(2, engine.block_table).end.tolist() == [0, 0], "and so is what a graph would read"


def test_before_there_is_a_worker_it_is_vllms() -> None:
    """While vLLM measures memory it builds, and captures, on a small KV cache: nothing of ours exists."""
    engine = Engine()
    engine.layer.impl.worker = None
    assert engine.capture(2).decode is None
    batch = InputBatch.make_dummy(2, 2, engine.buffers)
    metadata = engine._build(2, 2, batch.query_start_loc_np, 1, batch.seq_lens_cpu_upper_bound, 2, False)
    assert metadata.decode is None and metadata.stock is not None


def test_a_prompt_that_ends_with_one_token_is_no_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM runs such a row like a decode, and would replay a graph without the compaction."""
    engine = Engine()
    monkeypatch.setenv(CHOICE_VARIABLE, "triton")
    assert engine.builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    engine.run([("mine", 0, 40)], (record("mine", slot=1, prompt=41, budget=10),))
    assert engine.worker.has_unfinished_prompt()
    metadata = engine.run([("mine", 40, 1)])
    assert engine.worker.has_unfinished_prompt()
    assert [row.completes for row in metadata.prefills] == [True]
    assert metadata.decode is None and engine.worker.step.rows(1, engine.block_table).end.tolist() == [0]
    engine.run([("mine", 41, 1)])
    assert not engine.worker.has_unfinished_prompt()


@pytest.mark.parametrize("operators", ["xformers", "reference"])
def test_operators_that_allocate_or_wait_are_not_captured(operators: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE_VARIABLE, operators)
    assert CaliDropCudaMetadataBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER


def test_a_resumed_prompt_is_replayed_before_it_is_ours() -> None:
    """After a preemption the compaction point is behind the outputs; until then the row attends everything."""
    engine = Engine(CUDAGraphMode.PIECEWISE)
    resumed = record("mine", slot=1, prompt=40, budget=10, known=50)
    metadata = engine.run([("mine", 0, 49)], (resumed,))
    assert metadata.decode is None and not metadata.prefills[0].completes
    assert engine.run([("mine", 49, 1)]).prefills[0].completes
    decode = engine.run([("mine", 50, 1)]).decode
    assert decode is not None and decode.end.tolist() == [51]


def test_what_a_sequence_is_admitted_with() -> None:
    engine = Engine()
    engine.run([("a", 0, 1)], (record("a", slot=4, prompt=200, budget=50),))
    engine.run([("b", 0, 1)], (record("b", slot=6, prompt=100, budget=60),))
    held = engine.worker.slots.sequences
    assert held.start[[4, 6]].tolist() == [150, 40] and held.stored[[4, 6]].tolist() == [150, 40]
    assert held.theta1[[4, 6]].tolist() == [0.25, 0.25] and held.theta2[[4, 6]].tolist() == [0.75, 0.75]
    assert held.gate[[4, 6]].tolist() == [1, 1] and held.swap_blocks[4, :2].tolist() == [3, 4]


@pytest.mark.parametrize("rows", [0, MAX_ROWS])
def test_step_table_of_no_rows_and_of_all(rows: int) -> None:
    table = StepTable(MAX_ROWS, CPU)
    all_rows = np.arange(rows)
    table.write(all_rows >= 0, all_rows + 1, all_rows, all_rows + 10)
    view = table.rows(MAX_ROWS, torch.zeros((MAX_ROWS, 1)))
    assert view.end.tolist() == (all_rows + 10).tolist() + [0] * (MAX_ROWS - rows)
    assert table.stock_lens.tolist() == [1] * rows + [0] * (MAX_ROWS - rows)


# which CUDA graph a batch gets


class Dispatch:
    """vLLM's two choosers of a graph, wrapped, with a full graph for decodes and a piecewise one for all batches."""

    def __init__(self) -> None:
        full, piecewise = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
        self._v2: Any = object.__new__(CudaGraphManager)
        self._v2._graphs_captured, self._v2._lora_dispatch_map, self._v2._max_lora_case = True, {}, 0
        graphs = [BatchExecutionDescriptor(full, 2, 2, 1), BatchExecutionDescriptor(piecewise, 2, None)]
        self._v2._candidates = {(2, 0): graphs}
        self._v1: Any = object.__new__(CudagraphDispatcher)
        self._v1.keys_initialized, self._v1.cudagraph_mode = True, CUDAGraphMode.FULL_AND_PIECEWISE
        self._v1.compilation_config = SimpleNamespace(max_cudagraph_capture_size=2)
        self._v1.vllm_config = SimpleNamespace(lora_config=None, scheduler_config=SimpleNamespace(max_num_seqs=8))
        self._v1.specialize_lora_count, self._v1.uniform_decode_query_len = False, 1
        self._v1._bs_to_padded_graph_size = [0, 1, 2]
        self._v1.cudagraph_keys = {
            full: {BatchDescriptor(2, num_reqs=2, uniform=True)},
            piecewise: {BatchDescriptor(2)},
        }

    def v1(self) -> CUDAGraphMode:
        wrapped = cudagraphs._as_mixed_v1(original_of(CudagraphDispatcher, "dispatch"))
        return wrapped(self._v1, 2, uniform_decode=True)[0]

    def v2(self) -> CUDAGraphMode:
        wrapped = cudagraphs._as_mixed_v2(original_of(CudaGraphManager, "dispatch"))
        mode: CUDAGraphMode = wrapped(self._v2, 2, 2, 1, 0).cg_mode
        return mode


def test_no_full_graph_while_a_prompt_is_to_be_compacted() -> None:
    engine, dispatch = Engine(), Dispatch()
    assert (dispatch.v1(), dispatch.v2()) == (CUDAGraphMode.FULL, CUDAGraphMode.FULL)
    engine.run([("mine", 0, 40)], (record("mine", slot=1, prompt=41, budget=10),))
    engine.run([("mine", 40, 1), ("plain", 9, 1)])
    with step_of(engine.worker):
        assert (dispatch.v1(), dispatch.v2()) == (CUDAGraphMode.PIECEWISE, CUDAGraphMode.PIECEWISE)
    engine.run([("mine", 41, 1), ("plain", 10, 1)])
    with step_of(engine.worker):
        assert (dispatch.v1(), dispatch.v2()) == (CUDAGraphMode.FULL, CUDAGraphMode.FULL)
