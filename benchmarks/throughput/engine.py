"""vLLM engines inside this process, stepped by hand, so that two of them can take turns."""

from __future__ import annotations

import os

# Before vLLM is imported: the engine in this process, one thread.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.throughput.models import dtype, path_of
from benchmarks.throughput.timing import now

BLOCK_SIZE = 32


def random_prompt(length: int, seed: int = 0, vocabulary: int = 700) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, vocabulary) for _ in range(length)]


class Engine:
    """`LLM` with a backend: `calidrop`, or None for vLLM's own."""

    def __init__(self, model: str, backend: str | None, max_model_len: int, **options: Any) -> None:
        from vllm import LLM

        chosen = {"attention_backend": "CALIDROP"} if backend == "calidrop" else {}
        defaults: dict[str, Any] = {
            "dtype": dtype(),
            "block_size": BLOCK_SIZE,
            "max_model_len": max_model_len,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "disable_log_stats": True,
        }
        self.llm = LLM(str(path_of(model)), **(defaults | chosen | options))
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self._count = 0

    def close(self) -> None:
        self.core.shutdown()

    def submit(self, prompts: Sequence[list[int]], max_tokens: int, settings: dict[str, Any]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=dict(settings) or None
        )
        for prompt in prompts:
            self.engine.add_request(f"ask{self._count}", {"prompt_token_ids": prompt}, params)
            self._count += 1

    def step(self) -> float:
        """Seconds of one engine step."""
        started = now()
        self.engine.step()
        return now() - started

    def prefill(self) -> float:
        """Step until every request submitted has its first token; seconds of those steps."""
        seconds = 0.0
        scheduler = self.core.scheduler
        while scheduler.waiting or any(request.num_output_tokens == 0 for request in scheduler.running):
            seconds += self.step()
        return seconds

    def abort_all(self) -> None:
        self.engine.abort_request(list(self.core.scheduler.requests), internal=True)
        self.finish()

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            self.core.step_fn()
