"""What a step's attention on CUDA must know: vLLM's metadata for the whole batch, and which of its rows are ours.

The batch stays whole. vLLM's operator runs over all rows, and is told that a row with a compacted prompt has one token;
ours then answers those rows, wherever in the batch they are. So nothing is gathered or allocated per step, rows without
a budget get what vLLM gives them, and a batch of decodes can be replayed from a captured CUDA graph: all that differs
lies in persistent buffers (`StepTable`, vLLM's own block table).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata, TritonAttentionMetadataBuilder

from vllm_calidrop.ops.gpu import choice
from vllm_calidrop.ops.triton import Rows
from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
from vllm_calidrop.worker.prefill import PrefillRow, prefill_row
from vllm_calidrop.worker.worker import active_worker


@dataclass
class CaliDropCudaMetadata:
    """One step. stock: vLLM's, for every row, None if all rows are ours. decode: None if no row can be ours."""

    stock: TritonAttentionMetadata | None
    decode: Rows | None
    prefills: list[PrefillRow]


class CaliDropCudaMetadataBuilder(TritonAttentionMetadataBuilder):
    """Lengths come from the host's own numbers, exact without speculative decoding; the device is never waited for."""

    supports_draft_decode_metadata_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of xFormers, which allocates in every step: piecewise graphs only."""
        if choice() == "xformers":
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CaliDropCudaMetadata:
        cam = common_attn_metadata
        worker = self._worker()
        if worker is None:  # vLLM measures memory: nothing of ours exists yet
            return CaliDropCudaMetadata(super().build(common_prefix_len, cam, fast_build), None, [])
        # A replayed graph reads the step table and vLLM's buffers; what is returned here is for batches that run.
        num_mine, prefills = self._write_step(worker, cam)
        if num_mine == 0:
            return CaliDropCudaMetadata(super().build(common_prefix_len, cam, fast_build), None, prefills)
        stock = self._whole(worker, cam) if num_mine < cam.num_reqs else None
        return CaliDropCudaMetadata(stock, worker.step.rows(cam.num_reqs, cam.block_table_tensor), prefills)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> CaliDropCudaMetadata:
        """For a batch of any content: every row may be ours. Captured with none, as vLLM captures with length 1."""
        cam, worker = common_attn_metadata, self._worker()
        if worker is None:
            stock, decode = super().build(0, cam), None
        else:
            worker.step.clear()
            stock, decode = self._whole(worker, cam), worker.step.rows(cam.num_reqs, cam.block_table_tensor)
        stock.seq_lens.fill_(1)
        return CaliDropCudaMetadata(stock, decode, [])

    @property
    def _replays_graphs(self) -> bool:
        return bool(self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs())

    def _worker(self) -> CaliDropCudaWorker | None:
        layers = self.vllm_config.compilation_config.static_forward_context
        worker: CaliDropCudaWorker | None = layers[self.layer_names[0]].impl.worker
        return worker

    def _whole(self, worker: CaliDropCudaWorker, cam: CommonAttentionMetadata) -> TritonAttentionMetadata:
        """vLLM's metadata of the whole batch, with the lengths of the step table."""
        return super().build(0, cam.replace(seq_lens=worker.step.stock_lens[: cam.num_reqs]))

    def _write_step(self, worker: CaliDropCudaWorker, cam: CommonAttentionMetadata) -> tuple[int, list[PrefillRow]]:
        """Fill the step table for this batch; how many rows are ours, and the chunks of prompts to be compacted."""
        assert cam.seq_lens_cpu_upper_bound is not None
        seq_lens = cam.seq_lens_cpu_upper_bound.numpy()[: cam.num_reqs]
        running = active_worker() is worker
        request_ids = worker.request_ids(cam) if running and len(worker.sequences) else []
        rows = len(request_ids)
        slots = np.full(cam.num_reqs, -1, dtype=np.int64)
        slots[:rows] = worker.sequences.slots_of(request_ids)
        starts = cam.query_start_loc_cpu.numpy()[: cam.num_reqs + 1].astype(np.int64)
        lengths = np.diff(starts)
        done = seq_lens - lengths
        compacts = slots >= 0
        mine = compacts & (done >= worker.sequences.compaction_point[slots])
        assert (lengths[mine] == 1).all(), "a compacted sequence decodes one token a step"
        if mine.any() or self._replays_graphs:
            worker.step.write(mine, slots, starts[:-1], seq_lens)
        prefills = [
            prefill_row(
                worker.sequences.get(request_ids[row]),
                starts[row],
                done[row],
                lengths[row],
                cam.block_table_tensor[row],
            )
            for row in np.flatnonzero(compacts & ~mine)
        ]
        return int(mine.sum()), prefills
