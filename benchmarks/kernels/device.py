"""What the suite needs of the machine: timing, host waits, pinned memory as a device tensor, its description."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

Call = Callable[[], object]


def describe(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "interpreter": triton.knobs.runtime.interpret, "xformers": importlib.util.find_spec("xformers") is not None,
        "device": platform.processor() or platform.machine(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    return found


# Calls captured in one graph, so that what the host needs to launch them is not timed.
CAPTURED = 10
# Slow calls are repeated for about so long, and at least so often.
TIMED_SECONDS, LEAST = 2.0, 5


def seconds(call: Call, device: torch.device, repeats: int, captured: bool = True) -> float:
    """Median time of a warm call. On a GPU: by events, captured in a CUDA graph, or launched one by one; slow calls are
    repeated less often."""
    if device.type != "cuda":
        call()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    calls = 1
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if captured:
        graph, calls = torch.cuda.CUDAGraph(), CAPTURED
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        call = graph.replay
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = min(repeats, max(LEAST, int(TIMED_SECONDS / (time.perf_counter() - started))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3 / calls


# What makes the host wait, by the names under which CUDA's profiler and torch's report it.
WAITING = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero",
)  # fmt: skip


def synchronisations(call: Call, device: torch.device, steps: int) -> dict[str, int]:
    """How often the host waits for the device in `steps` warm calls, by what makes it wait. {}: never."""
    call()
    # The profiler waits itself when it stops.
    counts = _waits(call, device, steps)
    counts.subtract(_waits(call, device, 0))
    return {name: count for name, count in counts.items() if count > 0}


def _waits(call: Call, device: torch.device, steps: int) -> Counter[str]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            call()
    return Counter(event.name for event in profile.events() or [] if event.name in WAITING)


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Host memory, and the same memory as the kernels are given it: seen from the device where that is a GPU."""
    if device.type != "cuda":
        host = torch.zeros(shape, dtype=dtype)
        return host, host
    host = torch.zeros(shape, dtype=dtype, pin_memory=True)
    seen = torch.as_tensor(_Interface(host), device=device).view(dtype).view(shape)
    seen.view(-1)[-1] = 1
    torch.cuda.synchronize()
    if host.view(-1)[-1] != 1:
        raise RuntimeError("pinned memory seen from the device is not the host's: torch has copied it")
    return host, seen


def let_xformers_be_interpreted() -> None:
    """xFormers asks for a GPU and 16 bits; its kernels under Triton's interpreter need neither."""
    from xformers.ops.fmha import triton_splitk

    triton_splitk.FwOp.get_operator.cache_clear()
    triton_splitk.FwOp.SUPPORTED_DEVICES = {"cuda", "cpu"}
    triton_splitk.FwOp.SUPPORTED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


class _Interface:
    """Pinned memory lies at one address for host and device (unified addressing): torch takes it as a CUDA array."""

    def __init__(self, host: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (host.numel() * host.itemsize,), "typestr": "|u1", "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip
        self.host = host
