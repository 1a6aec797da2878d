"""Run in a process of its own (test_cuda_flavour.py): the CUDA backend over CPU tensors, under vLLM's V2 model runner.

vLLM's own Triton attention and our Triton kernels are interpreted: builder, implementation, compaction and kernels are
those that a GPU gets. Prints one line per identity; any difference is an AssertionError. With a path as argument, the
run's metadata is recorded there (tests/unit/test_cuda_recording.py replays it).
"""

from __future__ import annotations

import sys
from pathlib import Path

import tests.engine.conftest  # noqa: F401  (environment, before vLLM)
from benchmarks.kernels.metadata_recorder import MetadataRecorder
from tests.engine.cases import CALIBRATION, GATES, MODEL, POLICIES, CachedReference, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.support.interpreter import answer_for_a_gpu, few_splits, patch_language_once
from vllm_calidrop.hooks.wrap import installed_vllm_version


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
    assert type(engine.worker.model_runner).__module__ == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
    assert type(engine.worker.calidrop).__name__ == "CaliDropCudaWorker"

    settings = [
        {"kv_policy": policy, "kv_gate": gate, **calibration}
        for policy, gate, calibration in zip(POLICIES, GATES, CALIBRATION[1:], strict=True)
    ]
    recorder = MetadataRecorder(engine.worker.calidrop)
    asks = [Ask(prompt_of(100, seed), 6, {"kv_budget": 32, **chosen}) for seed, chosen in enumerate(settings)]
    asks.append(Ask(prompt_of(100, 40), 2))
    answers = engine.ask(asks)
    assert_equal_to_reference(asks, answers, [reference(ask) for ask in asks])
    reports = [answer.report for answer in answers if answer.report is not None]
    assert all(sum(report[name] for report in reports) for name in ("recomputes", "merges", "plain")), reports
    engine.assert_nothing_in_use()
    print("reference: equal")
    if len(sys.argv) > 1:
        recorder.save(Path(sys.argv[1]), vllm=installed_vllm_version())


if __name__ == "__main__":
    main()
