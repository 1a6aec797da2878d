"""What a user may put into vLLM's configuration: a scheduler and an extension of the worker (test_startup.py)."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class CountingScheduler(Scheduler):
    """Says in `kv_transfer_params`, which reaches the answer, how many steps it has scheduled."""

    steps = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().schedule(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        by_client = super().update_from_output(*args, **kwargs)
        for outputs in by_client.values():
            for output in outputs.outputs:
                output.kv_transfer_params = {"steps": self.steps}
        return by_client


class Extension:
    """A `worker_extension_cls`."""

    def classes_of_worker(self) -> list[str]:
        return [cls.__name__ for cls in type(self).__mro__]
