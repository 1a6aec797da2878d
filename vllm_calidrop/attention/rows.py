"""What a step's attention must know beyond vLLM's own metadata, and what a layer does with it, on every platform.

The batch stays whole. vLLM's operator runs over all rows, and is told that a row with a compacted prompt has one token;
ours then answers those rows, wherever in the batch they are. So nothing is gathered or allocated per step, rows without
a budget get what vLLM gives them, and a batch of decodes can be replayed from a captured CUDA graph: all that differs
lies in persistent buffers (worker/step.py, vLLM's own block table).
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_calidrop.ops.contract import Rows
from vllm_calidrop.support import refuse_layer
from vllm_calidrop.worker.compaction import compact, observe_chunk
from vllm_calidrop.worker.prefill import PrefillRow, prefill_row
from vllm_calidrop.worker.worker import CaliDropWorker, active_worker


@dataclass
class CaliDropMetadata:
    """One step. stock: vLLM's metadata for every row, None if all rows are ours. decode: None if no row can be ours."""

    stock: Any | None
    decode: Rows | None
    prefills: list[PrefillRow]


def write_step(
    worker: CaliDropWorker, cam: CommonAttentionMetadata, seq_lens: np.ndarray, always: bool = False
) -> tuple[int, list[PrefillRow]]:
    """Fill the worker's step table for this batch; how many rows are ours, and the chunks of prompts to be compacted.

    seq_lens: int [num_reqs], the host's own numbers. always: also when no row is ours, because a graph may be replayed.
    """
    running = active_worker() is worker and len(worker.sequences) > 0
    if not running and not always:
        return 0, []
    request_ids = worker.request_ids(cam) if running else []
    slots = np.full(cam.num_reqs, -1, dtype=np.int64)
    slots[: len(request_ids)] = worker.sequences.slots_of(request_ids)
    starts = cam.query_start_loc_cpu.numpy()[: cam.num_reqs + 1]
    lengths = np.diff(starts)
    done = seq_lens - lengths
    compacts = slots >= 0
    mine = compacts & (done >= worker.sequences.compaction_point[slots])
    if (lengths[mine] != 1).any():
        raise RuntimeError("calidrop: a compacted sequence was scheduled with several tokens; please report this")
    num_mine = int(mine.sum())
    if num_mine or always:
        worker.step.write(mine, slots, starts[:-1], seq_lens)
    prefills = [
        prefill_row(
            worker.sequences.get(request_ids[row]), starts[row], done[row], lengths[row], cam.block_table_tensor[row]
        )
        for row in np.flatnonzero(compacts & ~mine)
    ]
    return num_mine, prefills


class CompactedAttention:
    """What both implementations of a layer's attention add to vLLM's.

    worker, index, cache: given once ours exists (`attach`), which is before CUDA graphs are captured. Shapes as in
    `ops/contract.py`: query, output: [tokens, Hq, D]; kv_cache: [blocks, H, bs, 2 * D], with new K and V already in it.
    """

    scale: float
    worker: CaliDropWorker | None = None
    index: int = -1
    _kv_cache: Tensor | None = None
    _cache: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)

    def attach(self, worker: CaliDropWorker, index: int, kv_cache: Tensor) -> None:
        """kv_cache: the layer's, as `forward` gets it. ValueError where the operators cannot read it."""
        self.worker, self.index = worker, index
        self._cache_of(worker, kv_cache)

    def compacted(self, query: Tensor, kv_cache: Tensor, metadata: CaliDropMetadata, output: Tensor) -> None:
        """Compact what is complete, and answer the rows that attend a compacted prompt."""
        if not metadata.prefills and metadata.decode is None:
            return
        worker = self.worker
        if worker is None:
            raise RuntimeError("calidrop: a layer was never attached to the worker; please report this")
        cache = self._cache_of(worker, kv_cache)
        for row in metadata.prefills:
            chunk = query[row.first_token : row.first_token + row.length]
            observe_chunk(row, self.index, chunk, cache, worker.operators, self.scale)
            if row.completes:
                started = perf_counter()
                selection = compact(row, self.index, chunk[-1], cache, worker, self.scale)
                worker.layer_compacted(row.sequence, self.index, selection, perf_counter() - started)
        if metadata.decode is not None:
            worker.operators.decode(query, output, cache, self.index, metadata.decode, self.scale)

    def _cache_of(self, worker: CaliDropWorker, kv_cache: Tensor) -> Any:
        if self._kv_cache is not kv_cache:
            self._kv_cache, self._cache = kv_cache, worker.operators.cache_of(kv_cache)
        return self._cache
