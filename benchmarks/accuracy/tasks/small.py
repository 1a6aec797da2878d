"""The small model's own tasks (benchmarks/small_model/language.py), scored by exact match of the whole answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.samples import Message, Sample
from benchmarks.small_model import language

if TYPE_CHECKING:
    from benchmarks.accuracy.tokens import Tokens

# An answer that has not ended by then is wrong whatever follows.
SLACK = 4


def samples(entry: Tasks, tokens: Tokens) -> list[Sample]:
    """Lengths are prompt tokens (one word is one token); seeds run from `seed` upwards."""
    names = entry.names or list(language.TASKS)
    assert entry.lengths, "small: say which lengths"
    return [
        sample_of(name, length, index, entry.seed + index)
        for length in entry.lengths
        for name in names
        for index in range(entry.count)
    ]


def sample_of(name: str, length: int, index: int, seed: int) -> Sample:
    item = language.make(name, length, seed)
    answer = item.answer.removesuffix(language.END).strip()  # the end token is not part of the text served
    return Sample(
        task=name,
        length=length,
        index=index,
        prompt=item.prompt,
        messages=_messages(item),
        answers=[answer],
        metric="exact",
        max_tokens=len(item.answer.split()) + SLACK,
        meta={"seed": seed},
    )


def _messages(item: language.Sample) -> list[Message]:
    """The same tokens as a conversation: haystack and first question, its answer, the next question."""
    before = item.meta["haystack"] + " "
    messages: list[Message] = []
    for asks, reply in item.meta["turns"]:
        messages += [{"role": "user", "content": before + asks}, {"role": "assistant", "content": reply}]
        before = ""
    return messages[:-1]
