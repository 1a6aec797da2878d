"""Run in a process of its own (test_v2_runner.py): identities under vLLM's V2 model runner, on CPU under Triton's
interpreter. Prints one line per identity; any difference is an AssertionError.
"""

from __future__ import annotations

import tests.engine.conftest  # noqa: F401  (environment, before vLLM)
from tests.engine.cases import CALIBRATION, MODEL, POLICIES, CachedReference, prompt_of
from tests.engine.harness import MAY_STOP, Ask, Engine, assert_equal_to_reference


def main() -> None:
    reference = CachedReference()
    stock = Engine(MODEL, backend=None)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((200, 330))]
    expected = [answer.tokens for answer in stock.ask([Ask(prompt, 12) for prompt in prompts])]
    stock.close()

    engine = Engine(MODEL, max_num_batched_tokens=100, num_gpu_blocks_override=256)
    assert type(engine.worker.model_runner).__module__ == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
    assert [answer.tokens for answer in engine.ask([Ask(prompt, 12) for prompt in prompts])] == expected
    print("stock: equal")

    for budget in (32, 64):
        settings = {"kv_budget": budget, "kv_theta1": 2.0, "kv_theta2": 2.0}
        answers = engine.ask([Ask(prompt, 12, settings) for prompt in prompts])
        assert [answer.tokens for answer in answers] == expected, budget
    print("theta1 = 2: equal")

    asks = [
        Ask(prompt_of((200, 330)[index % 2], index), 12, {"kv_policy": policy, "kv_budget": 48, **calibration})
        for index, (policy, calibration) in enumerate((p, c) for p in POLICIES for c in CALIBRATION)
    ]
    asks.append(Ask(prompt_of(200, 40), 12))
    assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
    print("reference: equal")
    again = engine.ask(asks[:1])
    assert again[0].cached_tokens > 0
    assert_equal_to_reference(asks[:1], again, [reference(asks[0])])
    print("prefix hit: equal")
    engine.assert_nothing_in_use()

    small = Engine(
        MODEL,
        max_model_len=256,
        max_num_batched_tokens=200,
        num_gpu_blocks_override=26,
        additional_config={"calidrop": {"swap_bytes": 64 * 2**20}},
    )
    # One prompt by SnapKV, whose scores tie on it; more would leave the check of kept sets too little.
    settings = {1: {"kv_budget": 96}, 3: {"kv_budget": 96, "kv_policy": "streaming_llm"}}
    asks = [Ask(prompt_of(150, seed), 90, settings.get(seed, {})) for seed in range(5)]
    answers = small.ask(asks, **MAY_STOP)
    assert any(answer.preempted_at and ask.settings for ask, answer in zip(asks, answers, strict=True)), (
        "none preempted"
    )
    chosen = [i for i, answer in enumerate(answers) if len(answer.preempted_at) <= 1]
    expected_results = [reference(asks[i], resume_at=next(iter(answers[i].preempted_at), None)) for i in chosen]
    assert_equal_to_reference([asks[i] for i in chosen], [answers[i] for i in chosen], expected_results)
    small.assert_nothing_in_use()
    print("preemption: equal")


if __name__ == "__main__":
    main()
