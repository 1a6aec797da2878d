"""What travels between processes survives the journey."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_calidrop.records import (
    COUNTERS_ATTRIBUTE,
    RECORDS_ATTRIBUTE,
    SequenceCounters,
    SequenceRecord,
    StepRecords,
    records_of,
)

RECORD = SequenceRecord(
    request_id="a-1",
    admission=7,
    slot=3,
    prompt_len=1000,
    compaction_point=1010,
    budget=128,
    first_block=27,
    view_start=8,
    policy="snapkv",
    window=32,
    sinks=4,
    pool_kernel=5,
    theta1=0.7,
    theta2=0.85,
    gate=2,
    stored=872,
    swap_blocks=(4, 9, 1),
)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_step_records_pickle(protocol: int) -> None:
    step = StepRecords(released=["b", "c"], admitted=[RECORD])
    copy = pickle.loads(pickle.dumps(step, protocol))
    assert copy == step
    assert dataclasses.asdict(copy.admitted[0]) == dataclasses.asdict(RECORD)


def test_counters_pickle() -> None:
    counters = SequenceCounters.of(7, np.arange(8, dtype=np.int64).reshape(2, 4))
    copy = pickle.loads(pickle.dumps(counters))
    assert copy.admission == 7 and copy.counts.dtype == np.int64
    assert np.array_equal(copy.counts, counters.counts)


def test_records_travel_on_vllms_own_objects() -> None:
    """vLLM pickles SchedulerOutput to its workers and ModelRunnerOutput back; our attributes must go along."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    output = SchedulerOutput.make_empty()
    assert records_of(output) is None
    setattr(output, RECORDS_ATTRIBUTE, StepRecords(admitted=[RECORD]))
    assert records_of(pickle.loads(pickle.dumps(output))) == StepRecords(admitted=[RECORD])

    answer = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    setattr(answer, COUNTERS_ATTRIBUTE, {"a-1": SequenceCounters.of(7, np.ones((2, 4)))})
    copy = getattr(pickle.loads(pickle.dumps(answer)), COUNTERS_ATTRIBUTE)
    assert copy["a-1"].admission == 7


def test_a_step_without_records() -> None:
    assert records_of(SimpleNamespace()) is None


def test_records_are_final_and_default_lists_are_not_shared() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.slot = 4  # type: ignore[misc]
    StepRecords().released.append("a")
    assert StepRecords() == StepRecords([], [])


@pytest.mark.parametrize(("stored", "calibrated"), [(0, False), (1, True)])
def test_calibrated(stored: int, calibrated: bool) -> None:
    assert dataclasses.replace(RECORD, stored=stored).calibrated is calibrated
