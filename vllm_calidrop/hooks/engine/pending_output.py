"""vLLM's output of a step whose tokens are still on their way from the device, with something to do when they arrive.

It is a file of its own because the base class is imported with vLLM's engine, which hooks/engine/worker.py must not do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput


class PendingOutput(AsyncModelRunnerOutput):
    """Stands for `output`, an output of vLLM's; `attach` is called once with the finished one, in `get_output`."""

    def __init__(self, output: AsyncModelRunnerOutput, attach: Callable[[Any], None]) -> None:
        self._output = output
        self._attach = attach

    def get_output(self) -> Any:
        """vLLM's ModelRunnerOutput, after waiting for its tokens."""
        finished = self._output.get_output()
        self._attach(finished)
        return finished

    def get_kv_connector_output(self) -> Any:
        """What vLLM from 0.33 on saves of a step whose `get_output` has failed. Before 0.33 nobody calls it."""
        return self._output.get_kv_connector_output()
