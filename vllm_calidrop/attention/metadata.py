"""What a step's attention must know beyond vLLM's own metadata: which rows are compacted, and where their KV lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from vllm_calidrop.evicted.recall.store import RecallRows
from vllm_calidrop.worker.prefill import PrefillRow, prefill_row
from vllm_calidrop.worker.sequences import SequenceTable
from vllm_calidrop.worker.worker import active_worker


@dataclass
class DecodeRows:
    """Rows that attend a compacted prompt. N rows; one query token each.

    tokens: int64 [N], the row's query in the batch. slots: int64 [N], state slots.
    blocks: int32 [N, C], block-table columns from g on. start, end: int64 [N], the attended tokens among them.
    calibrated: int64 [M], indices of the rows that have a calibration state over all evicted KV; the next fields are
    for those: calibrated_slots int64 [M], theta1, theta2 float32 [M], gate int64 [M], swap_blocks int64 [M, W], stored
    int64 [M]. recalled: the rows that recall by pages, None if there are none. codec: int64 [M], numbers of codecs,
    None if all are `none`; most_reads: int64 [M], KV head groups a row may read in this layer, None if nobody has a
    budget.
    """

    tokens: Tensor
    slots: Tensor
    blocks: Tensor
    start: Tensor
    end: Tensor
    block_size: int
    calibrated: Tensor
    calibrated_slots: Tensor
    theta1: Tensor
    theta2: Tensor
    gate: Tensor
    swap_blocks: Tensor
    stored: Tensor
    recalled: RecallRows | None = None
    codec: Tensor | None = None
    most_reads: Tensor | None = None
    # What the native operator keeps from one layer of the step to the next.
    native: Any = None

    @cached_property
    def places(self) -> Tensor | slice:
        """`tokens` as an index."""
        return places(self.tokens.numpy())

    @cached_property
    def valid(self) -> Tensor:
        """bool [N, C * block_size]: the attended tokens."""
        position = torch.arange(self.blocks.shape[1] * self.block_size)
        return (position >= self.start[:, None]) & (position < self.end[:, None])


def places(tokens: np.ndarray) -> Tensor | slice:
    """Ascending tokens of a batch as an index: a slice where they are neighbours, so that nothing is copied."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else torch.from_numpy(tokens)


@dataclass
class CaliDropMetadata:
    """One step. stock: vLLM's metadata for the rows its own operator serves, None if there are none.

    stock_tokens: those rows' tokens in the batch, an index as `places` makes it; None if they are the whole batch.
    """

    stock: CPUAttentionMetadata | None
    stock_tokens: Tensor | slice | None
    decode: DecodeRows | None
    prefills: list[PrefillRow]


class CaliDropMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch: prompts and full-KV rows to vLLM's operator, rows with a compacted prompt to ours."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CaliDropMetadata:
        worker = active_worker()
        cam = common_attn_metadata
        sequences = worker.sequences if worker is not None else None
        if worker is None or not sequences:
            return CaliDropMetadata(super().build(common_prefix_len, cam, fast_build), None, None, [])

        request_ids = worker.request_ids(cam)
        rows = len(request_ids)
        starts = cam.query_start_loc_cpu.numpy()[: rows + 1].astype(np.int64)
        seq_lens = cam.seq_lens[:rows].numpy().astype(np.int64)
        lengths = np.diff(starts)
        done = seq_lens - lengths
        slots = sequences.slots_of(request_ids)
        compacts = slots >= 0
        decodes = compacts & (done >= sequences.compaction_point[slots])

        prefills = [
            prefill_row(
                sequences.get(request_ids[row]),
                starts[row],
                done[row],
                lengths[row],
                cam.block_table_tensor[row],
            )
            for row in np.flatnonzero(compacts & ~decodes)
        ]
        decode = (
            self._decode_rows(sequences, np.flatnonzero(decodes), slots, starts, lengths, seq_lens, cam)
            if decodes.any()
            else None
        )
        stock, stock_tokens = self._stock(
            common_prefix_len, cam, fast_build, np.flatnonzero(~decodes), starts, lengths, rows
        )
        return CaliDropMetadata(stock, stock_tokens, decode, prefills)

    def _decode_rows(
        self,
        sequences: SequenceTable,
        rows: np.ndarray,
        all_slots: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        seq_lens: np.ndarray,
        cam: CommonAttentionMetadata,
    ) -> DecodeRows:
        assert (lengths[rows] == 1).all(), "a compacted sequence decodes one token a step"
        slots = all_slots[rows]
        first_block = sequences.first_block[slots]
        end = seq_lens[rows] - first_block * self.block_size
        columns = -(-int(end.max()) // self.block_size)
        wanted = first_block[:, None] + np.arange(columns)
        wanted = np.minimum(wanted, cam.block_table_tensor.shape[1] - 1)
        blocks = cam.block_table_tensor[torch.from_numpy(rows)].gather(1, torch.from_numpy(wanted))
        # Columns past a row's own end may hold anything: point them at the row's first block.
        blocks = torch.where(
            torch.from_numpy(np.arange(columns) * self.block_size < end[:, None]), blocks, blocks[:, :1]
        )

        recalls = sequences.recalls[slots]
        recalled = torch.from_numpy(np.flatnonzero(recalls))
        calibrated = np.flatnonzero((sequences.stored[slots] > 0) & ~recalls)
        calibrated_slots = torch.from_numpy(slots[calibrated])
        stored = torch.from_numpy(sequences.stored[slots[calibrated]])
        return DecodeRows(
            tokens=torch.from_numpy(starts[rows]),
            slots=torch.from_numpy(slots),
            blocks=blocks,
            start=torch.from_numpy(sequences.view_start[slots]),
            end=torch.from_numpy(end),
            block_size=self.block_size,
            calibrated=torch.from_numpy(calibrated),
            calibrated_slots=calibrated_slots,
            theta1=sequences.theta1[calibrated_slots],
            theta2=sequences.theta2[calibrated_slots],
            gate=sequences.gate[calibrated_slots],
            swap_blocks=sequences.swap_table[calibrated_slots],
            stored=stored,
            codec=sequences.codecs_of(slots[calibrated]),
            most_reads=sequences.most_reads_of(slots[calibrated]),
            recalled=sequences.recall_rows(recalled, torch.from_numpy(slots[recalls])) if len(recalled) else None,
        )

    def _stock(
        self,
        common_prefix_len: int,
        cam: CommonAttentionMetadata,
        fast_build: bool,
        rows: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        num_rows: int,
    ) -> tuple[CPUAttentionMetadata | None, Tensor | slice | None]:
        if len(rows) == num_rows:
            return super().build(common_prefix_len, cam, fast_build), None
        if len(rows) == 0:
            return None, None
        row_index = torch.from_numpy(rows)
        # A row's tokens are consecutive: its first one, plus 0, 1, ... within the row.
        counts = lengths[rows]
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        tokens = places(np.repeat(starts[rows], counts) + within)
        query_start_loc = torch.zeros(len(rows) + 1, dtype=cam.query_start_loc.dtype)
        query_start_loc[1:] = torch.from_numpy(lengths[rows]).cumsum(0)
        seq_lens = cam.seq_lens[row_index]
        subset = cam.replace(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens,
            num_reqs=len(rows),
            num_actual_tokens=len(within),
            max_query_len=int(lengths[rows].max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=cam.block_table_tensor[row_index],
            slot_mapping=cam.slot_mapping[tokens],
        )
        return super().build(common_prefix_len, subset, fast_build), tokens
