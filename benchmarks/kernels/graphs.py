"""No host synchronisation in a decode step, and the step captured in a CUDA graph and replayed with other contents."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels import workload
from benchmarks.kernels.device import synchronisations
from benchmarks.kernels.resources import ModelShape
from benchmarks.kernels.workload import Limits, Workload


def check_step(
    shape: ModelShape, batch: int, kept: int, evicted: int, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """What made the host wait in ten steps, and whether a replayed step equals a launched one (None: not a GPU)."""
    work = workload.make(shape, batch, kept, evicted, device, dtype, limits)
    work.recompute(max(1, batch // 2))
    steps = 10 if device.type == "cuda" else 1
    waits = synchronisations(work.step(), device, steps)
    return {
        "batch": batch, "kept": kept, "evicted": evicted, "steps": steps, "synchronisations": waits,
        "graph_equals_launch": replay_equals_launch(work) if device.type == "cuda" else None,
    }  # fmt: skip


def replay_equals_launch(work: Workload) -> bool:
    """Capture, change queries, lengths, thresholds and padding, replay; the same step launched must say the same."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.step()()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.step()()

    work.query.normal_()
    work.rows.end.sub_(torch.arange(len(work.rows.end), device=work.rows.end.device, dtype=torch.int32) % 3)
    work.rows.end[-1] = 0 if len(work.rows.end) > 1 else work.rows.end[-1]
    work.recompute(max(1, len(work.rows.end) // 3))
    before = [part.clone() for part in work.state]

    def outcome() -> list[torch.Tensor]:
        return [work.out.clone(), *(part.clone() for part in work.state)]

    work.out.zero_()
    graph.replay()
    replayed = outcome()
    for part, old in zip(work.state, before):
        part.copy_(old)
    work.out.zero_()
    work.step()()
    return all(torch.equal(a, b) for a, b in zip(replayed, outcome()))
