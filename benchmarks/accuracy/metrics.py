"""What an answer is worth, in [0, 1], by the metric's name."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from benchmarks.accuracy.samples import Sample

Metric = Callable[[str, Sample], float]


def exact(text: str, sample: Sample) -> float:
    """Every word right, nothing before and nothing after."""
    return float(any(text.split() == answer.split() for answer in sample.answers))


def all_in(text: str, sample: Sample) -> float:
    """RULER: the share of the answers that occur in the reply, in any case."""
    return _mean(answer.lower() in text.lower() for answer in sample.answers)


def any_in(text: str, sample: Sample) -> float:
    """RULER's questions: one of the answers occurs in the reply."""
    return float(any(answer.lower() in text.lower() for answer in sample.answers))


def word_recall(text: str, sample: Sample) -> float:
    """Needle in a haystack: the share of the answer's telling words (articles and prepositions aside)."""
    said = set(normalized(text).split())
    telling = [word for word in normalized(sample.answers[0]).split() if word not in _SMALL_WORDS]
    return _mean(word in said for word in telling)


_SMALL_WORDS = {"at", "behind", "beside", "from", "in", "of", "on", "under", "with"}


# LongBench


def normalized(text: str) -> str:
    """Lower case; no punctuation, articles or double spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(text: str, sample: Sample) -> float:
    """Harmonic mean of precision and recall over words, as multisets; the best answer counts."""
    said = Counter(normalized(text).split())

    def one(answer: str) -> float:
        wanted = Counter(normalized(answer).split())
        shared = (said & wanted).total()
        return 2 * shared / (said.total() + wanted.total()) if shared else 0.0

    return max(map(one, sample.answers), default=0.0)


def rouge_l(text: str, sample: Sample) -> float:
    """F measure of the longest common subsequence of words; the best answer counts."""
    return max((_rouge().score(answer, text)["rougeL"].fmeasure for answer in sample.answers), default=0.0)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def classification(text: str, sample: Sample) -> float:
    """The class is named; the credit is shared among all classes named, but for parts of the right one's name."""
    right = sample.answers[0]
    named = [name for name in sample.meta["all_classes"] if name in text]
    named = [name for name in named if name == right or name not in right]
    return 1 / len(named) if right in named else 0.0


def retrieval(text: str, sample: Sample) -> float:
    """Which share of the numbers in the reply is the right paragraph's."""
    found = re.search(r"Paragraph (\d+)", sample.answers[0])
    assert found, sample.answers
    return _mean(number == found[1] for number in re.findall(r"\d+", text))


def count(text: str, sample: Sample) -> float:
    """Which share of the numbers in the reply is the right one."""
    return _mean(number == sample.answers[0].strip() for number in re.findall(r"\d+", text))


def code_similarity(text: str, sample: Sample) -> float:
    """Edit similarity of the first line that is neither fence nor comment; the best answer counts."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    from rapidfuzz import fuzz

    return max((round(fuzz.ratio(line, answer)) / 100 for answer in sample.answers), default=0.0)


def _mean(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (exact, all_in, any_in, word_recall, f1, rouge_l, classification, retrieval, count, code_similarity)
}


def score(text: str, sample: Sample) -> float:
    if sample.first_line:
        text = text.lstrip("\n").split("\n")[0]
    return METRICS[sample.metric](text, sample)
