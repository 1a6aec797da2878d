"""A chunk of a prompt that will be compacted, and the queries that SnapKV wants of it: the same on every device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_calidrop.worker.sequences import Sequence


@dataclass
class PrefillRow:
    """A chunk of a prompt that will be compacted, at positions [done, done + length).

    first_token: index of its first query in the batch. blocks: int [columns], its block table.
    completes: this chunk ends at the compaction point.
    """

    sequence: Sequence
    first_token: int
    done: int
    length: int
    blocks: Tensor
    completes: bool


def prefill_row(sequence: Sequence | None, first_token: int, done: int, length: int, blocks: Tensor) -> PrefillRow:
    assert sequence is not None
    end = int(done + length)
    assert end <= sequence.record.compaction_point, (end, sequence.record)
    return PrefillRow(
        sequence, int(first_token), int(done), int(length), blocks, end == sequence.record.compaction_point
    )


def observe_window(row: PrefillRow, layer: int, queries: Tensor, prompt_end: int) -> None:
    """Remember the chunk's queries [length, Hq, D] among those of the last `window` prompt positions."""
    record = row.sequence.record
    window_start = record.prompt_len - record.window
    first = max(row.done, window_start)
    if first >= prompt_end:
        return
    seen = queries[first - row.done : prompt_end - row.done]
    stash = row.sequence.window_queries.get(layer)
    if stash is None:
        if len(seen) == record.window:
            row.sequence.window_queries[layer] = seen.clone()
            return
        stash = queries.new_empty((record.window, *queries.shape[1:]))
        row.sequence.window_queries[layer] = stash
    stash[first - window_start : prompt_end - window_start] = seen
