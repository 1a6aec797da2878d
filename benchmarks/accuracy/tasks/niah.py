"""Needle in a Haystack: one remark in an essay, at every depth and length asked for.

A reply's score is the share of the needle's telling words it contains, so the heat maps have shades. Reply length and
haystack are options. Options: depths (list of 0..1, default 11 even steps), haystack (text file or folder), reserve
(tokens left free for a chat template), reply (default 32).
"""

from __future__ import annotations

import random

from benchmarks.accuracy import haystack
from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tokens import Tokens, fit
from benchmarks.accuracy.words import Names

TASK = "niah"
DOINGS = (
    ("feed", "swans", "behind the old mill"),
    ("fly", "kites", "on the empty airfield"),
    ("drink", "hot chocolate", "under the station clock"),
    ("read", "letters", "in the glass pavilion"),
    ("count", "trains", "from the iron footbridge"),
    ("eat", "plum cake", "at the top of the lighthouse"),
    ("hear", "cellists", "in the dry swimming pool"),
    ("draw", "fishing boats", "from the customs steps"),
    ("watch", "owls", "beside the vineyard wall"),
    ("play", "chess", "with the ferry captain"),
)


def samples(entry: Tasks, tokens: Tokens) -> list[Sample]:
    """`count` needles for each depth and length."""
    assert entry.lengths, "niah: say which lengths"
    depths = entry.options.get("depths") or [step / 10 for step in range(11)]
    return [
        sample_of(length, depth, round_ * len(depths) + at, entry, tokens)
        for length in entry.lengths
        for round_ in range(entry.count)
        for at, depth in enumerate(depths)
    ]


def sample_of(length: int, depth: float, index: int, entry: Tasks, tokens: Tokens) -> Sample:
    rng = random.Random(f"niah/{length}/{entry.seed}/{index}")
    town = Names(rng).word().capitalize() + "ford"
    verb, what, where = rng.choice(DOINGS)
    answer = f"{verb} {what} {where}"
    needle = f"Whoever comes to {town} should, before anything else, {answer}."
    reply = entry.options.get("reply", 32)
    words = haystack.essay(entry.options.get("haystack"))
    start = rng.randrange(len(words))
    frame = "Read the text below; a question about it follows."
    ask = f"Question: what should one do first in {town}? Answer from the text, in one sentence."
    prefix = "\nAnswer: one should"

    def build(n: int) -> str:
        text = haystack.insert(haystack.take(words, n, start), [needle], [depth])
        return f"{frame}\n\n{text}\n\n{ask}"

    limit = length - reply - entry.options.get("reserve", 0)
    prompt = build(fit(lambda n: build(n) + prefix, limit, tokens.count))
    return Sample(
        task=TASK,
        length=length,
        index=index,
        prompt=prompt,
        prefix=prefix,
        answers=[answer],
        metric="word_recall",
        max_tokens=reply,
        meta={"seed": entry.seed, "depth": depth, "needle": needle},
    )
