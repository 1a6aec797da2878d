"""Run in a process of its own (test_cuda_flavour.py): the CUDA backend over CPU tensors, under vLLM's V2 model runner.

vLLM's own Triton attention and our Triton kernels are interpreted: builder, implementation, compaction and kernels are
those that a GPU gets. Prints one line per identity; any difference is an AssertionError.
"""

from __future__ import annotations

import tests.engine.conftest  # noqa: F401  (environment, before vLLM)
from tests.engine.cases import CALIBRATION, GATES, MODEL, POLICIES, CachedReference, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.support.interpreter import answer_for_a_gpu, few_splits, patch_language_once


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
    asks = [Ask(prompt_of(100, seed), 6, {"kv_budget": 32, **chosen}) for seed, chosen in enumerate(settings)]
    asks.append(Ask(prompt_of(100, 40), 2))
    answers = engine.ask(asks)
    assert_equal_to_reference(asks, answers, [reference(ask) for ask in asks])
    reports = [answer.report for answer in answers if answer.report is not None]
    assert all(sum(report[name] for report in reports) for name in ("recomputes", "merges", "plain")), reports
    engine.assert_nothing_in_use()
    print("reference: equal")


if __name__ == "__main__":
    main()
