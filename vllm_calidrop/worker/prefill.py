"""A chunk of a prompt that will be compacted, and its last queries that are looked at then: alike on every device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.recall.balance import balance_queries
from vllm_calidrop.records import SequenceRecord
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


def last_queries_of(record: SequenceRecord) -> int:
    """Of how many of the last prompt positions the queries are looked at: by the policy, for the balance of recall."""
    for_balance = balance_queries(record.recall.rest if record.recall else "none", record.prompt_len)
    return POLICIES[record.policy].last_queries(record.window, for_balance)


def observe_last_queries(row: PrefillRow, layer: int, queries: Tensor, prompt_end: int) -> None:
    """Remember the chunk's queries [length, Hq, D] among those of the last prompt positions that will be looked at."""
    record = row.sequence.record
    count = last_queries_of(record)
    window_start = record.prompt_len - count
    first = max(row.done, window_start)
    if first >= prompt_end:
        return
    seen = queries[first - row.done : prompt_end - row.done]
    stash = row.sequence.last_queries.get(layer)
    if stash is None:
        if len(seen) == count:
            row.sequence.last_queries[layer] = seen.clone()
            return
        stash = queries.new_empty((count, *queries.shape[1:]))
        row.sequence.last_queries[layer] = stash
    stash[first - window_start : prompt_end - window_start] = seen
