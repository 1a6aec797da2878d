"""Record the metadata of a short run on a GPU: `python -m benchmarks.kernels.record_metadata MODEL recording.json`.

Prompts in chunks, decodes with and without budgets; with CUDA graphs unless --eager. Put the file into
tests/unit/recordings/, and tests/unit/test_cuda_recording.py replays it.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    parser.add_argument("--outputs", type=int, default=12, help="tokens of every answer")
    parser.add_argument("--vocabulary", type=int, default=500, help="prompts are random ids below this")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the recorder looks into the engine's process

    from vllm import LLM, SamplingParams

    from benchmarks.kernels.metadata_recorder import MetadataRecorder
    from vllm_calidrop.hooks.wrap import installed_vllm_version

    llm = LLM(
        arguments.model,
        attention_backend="CALIDROP",
        enforce_eager=arguments.eager,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=512,
        num_gpu_blocks_override=512,
        skip_tokenizer_init=True,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    recorder = MetadataRecorder(worker.calidrop)
    draw = random.Random(0)
    lengths = (100, 129, 200, 65, 90)
    prompts = [{"prompt_token_ids": [draw.randrange(arguments.vocabulary) for _ in range(n)]} for n in lengths]
    h2o = {"kv_budget": 64, "kv_policy": "h2o"}
    budgets: list[dict[str, object]] = [{"kv_budget": 32}, h2o, {}, {"kv_budget": 33}, {}]
    params = [
        SamplingParams(
            temperature=0, max_tokens=arguments.outputs, ignore_eos=True, detokenize=False, extra_args=budget or None
        )
        for budget in budgets
    ]
    llm.generate(prompts, params, use_tqdm=False)
    recorder.save(arguments.output, vllm=installed_vllm_version())
    print(f"{len(recorder.steps)} steps in {arguments.output}")


if __name__ == "__main__":
    main()
