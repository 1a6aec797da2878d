"""What a test of Triton kernels in a whole engine, under Triton's interpreter, needs to be over in a minute."""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """The interpreter makes `triton.language` interpret at every call of a device function, again and again.

    Once for each launch and module of functions is enough: nothing undoes it before the launch ends.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def run_grid(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = run_grid
    interpreter.InterpretedFunction.__call__ = call


def few_splits() -> None:
    """A GPU wants many programs, the interpreter runs one after the other; our own operators know that."""
    import vllm.v1.attention.backends.triton_attn as stock

    stock.NUM_PAR_SOFTMAX_SEGMENTS = 2


def answer_for_a_gpu() -> None:
    """vLLM's operator that writes the KV cache asks how large the GPU's tiles may be."""
    import torch

    torch.cuda.get_device_capability = lambda device=None: (9, 0)
