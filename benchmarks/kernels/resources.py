"""Registers, shared memory and spills of the kernels, compiled for a GPU that need not be there.

What is compiled is what the launch functions launch: their calls are taken down instead of carried out, and each is
given to Triton's compiler as Triton itself would, with integers that are 1 or multiples of 16 known as such.
`python -m benchmarks.kernels.resources` prints the table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 90)
# A block's shared memory at most, bytes: A100 (sm_80) and H100 (sm_90).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Resources(NamedTuple):
    """Of one compiled kernel. stack: bytes a thread spills to local memory (or keeps there); shared: bytes a block."""

    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int


def launches(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch. Its tensors may be on any device, meta included; nothing is computed."""
    found: list[Launch] = []

    def take_down(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        found.append(Launch(kernel, grid, dict(zip(kernel.arg_names, args)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", take_down):
        call()
    return found


def resources(launch: Launch, capability: int) -> Resources:
    """Compile for sm_`capability` and read what the machine code needs."""
    kernel = launch.kernel
    constants_of_kernel = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        argument = launch.arguments[name]
        if name in constants_of_kernel or argument is None or (type(argument) is int and argument == 1):
            signature[name], constants[name] = "constexpr", argument
            continue
        if isinstance(argument, Tensor):
            signature[name] = TYPES[argument.dtype]
            aligned = argument.is_meta or argument.data_ptr() % 16 == 0
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
            aligned = isinstance(argument, int) and argument % 16 == 0
        if aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Resources(kernel.__name__, capability, int(registers), int(stack), int(compiled.metadata.shared))
