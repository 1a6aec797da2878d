"""What a step costs the host beside the attention of its layers: ours, by number of compacted rows, over vLLM's own.

`python -m benchmarks.throughput.host`: two engines of the small model in this process take turns step by step; the time
inside the layers' attention is taken off, so that what is left is scheduling, metadata, records, counters and reports.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.throughput.engine import Engine, random_prompt
from benchmarks.throughput.timing import now

ROWS = (16, 256, 1024)
PROMPT, BUDGET = 64, 32
SETTINGS = {"kv_budget": BUDGET, "kv_theta1": -2.0, "kv_theta2": -2.0, "kv_window": 8}


class _Attention:
    """Seconds spent in the attention of all layers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        config = engine.core.model_executor.driver_worker.worker.vllm_config
        for layer in config.compilation_config.static_forward_context.values():
            forward = layer.impl.forward

            def timed(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
                started = now()
                try:
                    return _forward(*args, **kwargs)
                finally:
                    self.seconds += now() - started

            layer.impl.forward = timed


def measure(model: str = "small", rows: tuple[int, ...] = ROWS, steps: int = 40) -> list[dict[str, Any]]:
    """Per number of rows: median ms of a step outside of attention, of both engines, and their difference."""
    most = max(rows)
    options: dict[str, Any] = {"max_num_seqs": most, "max_num_batched_tokens": max(2048, most), "enforce_eager": True}
    options |= {"num_gpu_blocks_override": 8 * most, "enable_prefix_caching": False}
    engines = {
        name: Engine(model, backend, 256, **options) for name, backend in (("stock", None), ("ours", "calidrop"))
    }
    attention = {name: _Attention(engine) for name, engine in engines.items()}
    found = []
    try:
        for count in rows:
            for name, engine in engines.items():
                prompts = [random_prompt(PROMPT, seed) for seed in range(count)]
                engine.submit(prompts, steps + 90, SETTINGS if name == "ours" else {})
                engine.prefill()
                for _ in range(4):
                    engine.step()
            outside: dict[str, list[float]] = {name: [] for name in engines}
            for step in range(steps):
                for name in list(engines)[:: 1 if step % 2 else -1]:
                    before = attention[name].seconds
                    seconds = engines[name].step()
                    outside[name].append(seconds - (attention[name].seconds - before))
            for engine in engines.values():
                engine.abort_all()
            middle = {name: sorted(times)[steps // 2] * 1e3 for name, times in outside.items()}
            found.append({"rows": count, **middle, "cost": middle["ours"] - middle["stock"]})
    finally:
        for engine in engines.values():
            engine.close()
    return found


def main() -> None:
    for row in measure():
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))


if __name__ == "__main__":
    main()
