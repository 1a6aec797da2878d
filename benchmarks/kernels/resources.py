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

from vllm_calidrop.evicted.codecs import layout_table
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK
from vllm_calidrop.ops import triton as ops
from vllm_calidrop.records import COUNTERS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 90)
# A block's shared memory at most, bytes: A100 (sm_80) and H100 (sm_90).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
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
    any_value = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        argument = launch.arguments[name]
        is_one = type(argument) is int and argument == 1 and name not in any_value
        if name in constants_of_kernel or argument is None or is_one:
            signature[name], constants[name] = "constexpr", argument
            continue
        if isinstance(argument, Tensor):
            signature[name] = TYPES[argument.dtype]
            aligned = argument.is_meta or argument.data_ptr() % 16 == 0
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
            aligned = isinstance(argument, int) and argument % 16 == 0
        if aligned and name not in any_value:
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


class ModelShape(NamedTuple):
    """group: query heads per KV head. The named ones are those of the models in `SHAPES`."""

    kv_heads: int
    group: int
    head_dim: int


SHAPES = {
    "Llama-2-7B": ModelShape(32, 1, 128),
    "Llama-3-8B": ModelShape(8, 4, 128),
    "Llama-3.2-1B": ModelShape(8, 4, 64),
    "Phi-3-mini": ModelShape(32, 1, 96),
    "Gemma-7B": ModelShape(16, 1, 256),
    "Falcon-like, 16 heads a group": ModelShape(8, 16, 128),
    "16 heads a group, head_dim 256": ModelShape(8, 16, 256),
}


def all_launches(shape: ModelShape, dtype: torch.dtype = torch.bfloat16, rows: int = 8) -> list[Launch]:
    """Every kernel as the launch functions call it for vLLM's CUDA cache (token-major, blocks of 16), int32 tables."""
    kv_heads, group, head_dim = shape
    heads = kv_heads * group

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def integers(*size: int) -> Tensor:
        return empty(*size, dtype=torch.int32)

    cache = ops.KVCache(*empty(64, 16, kv_heads, 2 * head_dim, dtype=dtype).transpose(1, 2).split(head_dim, -1))
    pages = empty(64, kv_heads, PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim, dtype=dtype)
    slots, layers = 16, 32
    state = ops.State(
        empty(slots, kv_heads, group, head_dim, dtype=dtype), empty(slots, kv_heads, group, head_dim),
        empty(slots, kv_heads, group), empty(slots, layers, len(COUNTERS), dtype=torch.int64)[:, 0],
    )  # fmt: skip
    table = ops.Rows(integers(rows), integers(rows), integers(rows), integers(rows, 512))
    sequences = ops.Sequences(
        integers(slots), integers(slots), empty(slots), empty(slots), integers(slots), integers(slots, 64),
        integers(slots), integers(slots), layout_table(head_dim, dtype, "meta"),
    )  # fmt: skip
    splits = ops.splits_for(rows, kv_heads)
    scratch = ops.view_scratch(ops.make_scratch(rows, kv_heads, group, head_dim, "meta"), rows, *shape, splits)
    query, out = empty(rows, heads, head_dim, dtype=dtype), empty(rows, heads, head_dim, dtype=dtype)
    blocks, scale = integers(512), head_dim**-0.5
    positions = empty(kv_heads, 1024, dtype=torch.int64)
    moved = empty(2, kv_heads, 1024, head_dim, dtype=dtype)
    one = ops.view_scratch(ops.make_scratch(1, *shape, "meta"), 1, *shape)
    window = empty(32, heads, head_dim, dtype=dtype)
    sums = empty(kv_heads, 8192)

    def call() -> None:
        ops.decode_step(query, out, cache, pages, table, sequences, state, scratch, scale)
        ops.add_column_sums(
            sums, window, cache, blocks, 4096, scale, empty(ops.score_scratch_elements(32, kv_heads, group))
        )
        ops.copy_evicted(cache, blocks, positions, pages, integers(64))
        ops.calibrate(query[0], cache, blocks, positions, state, 0, one, scale)
        ops.gather_kept(cache, blocks, positions, moved)
        ops.scatter_kept(cache, blocks, 3072, moved)

    return launches(call)


def main() -> None:
    print(f"{'model shape':32}{'kernel':24}{'sm':>4}{'registers':>11}{'spilled B':>11}{'shared KiB':>12}")
    for name, shape in SHAPES.items():
        for launch in all_launches(shape):
            for capability in CAPABILITIES:
                found = resources(launch, capability)
                print(
                    f"{name:32}{found.kernel:24}{capability:>4}{found.registers:>11}{found.stack:>11}"
                    f"{found.shared / 1024:>12.1f}"
                )


if __name__ == "__main__":
    main()
