"""Run in a process of its own (test_cuda_flavour.py): the CUDA backend over CPU tensors, under either model runner.

vLLM's own Triton attention and our Triton kernels are interpreted: builder, implementation, compaction and kernels are
those that a GPU gets. Under V2, in every other batch of decodes, the layers are given metadata made for capture before
the first step, with one row more than the batch has: what a replayed CUDA graph would have is what lies at those
addresses. Prints one line per identity; any difference is an AssertionError. With a path as argument, the run's
metadata is recorded there (tests/unit/test_cuda_recording.py replays it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import tests.engine.conftest  # noqa: F401  (environment, before vLLM)
from benchmarks.kernels.metadata_recorder import MetadataRecorder
from tests.engine.cases import CALIBRATION, GATES, MODEL, POLICIES, CachedReference, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.reference.codecs import read_bytes
from tests.support.interpreter import answer_for_a_gpu, few_splits, patch_language_once
from vllm_calidrop.hooks.wrap import installed_vllm_version
from vllm_calidrop.ops.registry import choice


class Replays:
    """Stands for CUDA graphs: captured metadata, by rows, in place of a decode batch's own; every other one."""

    def __init__(self, runner: Any) -> None:
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        from vllm_calidrop.attention.cuda import CaliDropCudaImpl, CaliDropCudaMetadataBuilder

        CaliDropCudaMetadataBuilder._replays_graphs = True  # type: ignore[assignment,method-assign]
        layers = sorted(runner.vllm_config.compilation_config.static_forward_context)
        self.captured = {
            rows: prepare_inputs_to_capture(
                rows,
                rows,
                runner.model_state,
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                full_cudagraph=True,
                max_query_len=1,
            ).attn_metadata[layers[0]]
            for rows in range(1, runner.max_num_reqs + 1)
        }
        self.batches = self.replayed = 0
        self._last: Any = None
        self._replaying = False
        forward = CaliDropCudaImpl.forward

        def replayed(impl: Any, *tensors: Any, **named: Any) -> Any:
            *before, metadata = tensors
            return forward(impl, *before, self._choose(metadata), **named)

        CaliDropCudaImpl.forward = replayed  # type: ignore[method-assign]

    def _choose(self, metadata: Any) -> Any:
        """The same for all layers of a step."""
        if metadata is None or metadata.decode is None:
            return metadata
        rows = len(metadata.decode.slot)
        if metadata is not self._last:
            decodes = not metadata.prefills and (metadata.stock is None or metadata.stock.max_query_len == 1)
            self._last, self.batches = metadata, self.batches + decodes
            self._replaying = decodes and self.batches % 2 == 1 and rows + 1 in self.captured
            self.replayed += self._replaying
        return self.captured[rows + 1] if self._replaying else metadata


def main() -> None:
    answer_for_a_gpu()
    few_splits()
    patch_language_once()
    reference = CachedReference()
    engine = Engine(
        MODEL,
        block_size=16,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        num_gpu_blocks_override=256,
        kv_cache_memory_bytes=2**26,
    )
    is_v2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert type(engine.worker.model_runner).__module__ == f"vllm.v1.worker.{'cpu.' if is_v2 else 'cpu_'}model_runner"
    operators = engine.worker.calidrop.operators.name
    assert operators == {"auto": "triton"}.get(choice(), choice())

    settings = [
        {"kv_policy": policy, "kv_gate": gate, **calibration}
        for policy, gate, calibration in zip(POLICIES, GATES, CALIBRATION[1:], strict=True)
    ]
    recorder = MetadataRecorder(engine.worker.calidrop)
    replays = Replays(engine.worker.model_runner) if is_v2 else None
    asks = [Ask(prompt_of(100, seed), 6, {"kv_budget": 32, **chosen}) for seed, chosen in enumerate(settings)]
    one_head = 4 * read_bytes("int8", 68, 64, 4)  # lets each of the four layers read one of its two KV heads
    settings = [{"kv_codec": "int2"}, {"kv_codec": "int8", "kv_read_budget": one_head}, {"kv_read_budget": 0}]
    asks += [
        Ask(prompt_of(100, 20 + seed), 6, {"kv_budget": 32, "kv_theta1": 0.8, "kv_theta2": 0.85, **chosen})
        for seed, chosen in enumerate(settings)
    ]
    asks.append(Ask(prompt_of(100, 40), 3))
    answers = engine.ask(asks)
    assert_equal_to_reference(asks, answers, [reference(ask) for ask in asks])
    reports = [answer.report for answer in answers if answer.report is not None]
    assert all(sum(report[name] for report in reports) for name in ("recomputes", "merges", "plain", "skipped")), (
        reports
    )
    engine.assert_nothing_in_use()
    print(f"{operators} against the reference: equal")
    if replays is not None:
        assert replays.replayed >= 2 and replays.batches > replays.replayed, (replays.replayed, replays.batches)
        print("captured metadata: equal")
    if len(sys.argv) > 1:
        recorder.save(Path(sys.argv[1]), vllm=installed_vllm_version())


if __name__ == "__main__":
    main()
