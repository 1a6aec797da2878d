"""The suites: each turns an entry of the configuration into samples, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks import longbench, niah, ruler, small

if TYPE_CHECKING:
    from benchmarks.accuracy.tokens import Tokens

Suite = Callable[[Tasks, "Tokens"], list[Sample]]
SUITES: dict[str, Suite] = {
    "small": small.samples,
    "ruler": ruler.samples,
    "niah": niah.samples,
    "longbench": longbench.samples,
}


def samples_of(tasks: list[Tasks], tokens: Tokens) -> list[Sample]:
    """All samples, index by index: a run cut short has asked every task about equally often."""
    found = [sample for entry in tasks for sample in SUITES[entry.suite](entry, tokens)]
    assert len({sample.id for sample in found}) == len(found), "two entries give the same sample"
    return sorted(found, key=lambda sample: sample.index)
