"""Each metric against cases computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy.metrics import METRICS, score
from benchmarks.accuracy.samples import Sample

CLASSES = ["Date", "Location", "City", "Invention, book and other creative piece", "Invention"]


def scored(metric: str, text: str, *answers: str, **fields: Any) -> float:
    return score(text, Sample("t", 0, 0, "", list(answers), metric, 10, **fields))


CASES: list[tuple[str, str, list[str], float]] = [
    ("exact", " key 0a 1b .", ["key 0a 1b ."], 1),
    ("exact", "key 0a 1b", ["key 0a 1b ."], 0),
    ("exact", "b", ["a", "b"], 1),
    ("all_in", "they are 12 and 34", ["12", "34", "56", "78"], 0.5),
    ("all_in", "GREEN", ["green"], 1),
    ("any_in", "it was Paris, France", ["paris", "rome"], 1),
    ("any_in", "nothing", ["paris"], 0),
    ("word_recall", "swans. feed!", ["feed swans behind the old mill"], 2 / 4),  # feed swans old mill
    # reply: 4 words without the article; answer: 3; 2 shared: 2 * 2 / 7
    ("f1", "The red fox ran home", ["a red fox slept"], 4 / 7),
    ("f1", "Red FOX!", ["wolf", "the red fox"], 1),
    # multisets: one `very` of two is shared: 2 * 2 / (2 + 3)
    ("f1", "very good", ["very very good"], 4 / 5),
    ("f1", "none", ["other"], 0),
    ("f1", "", ["x"], 0),
    # longest common subsequence `police killed gunman` -> 3 of 4 and 3 of 4 words
    ("rouge_l", "police ended killed gunman", ["police killed the gunman"], 3 / 4),
    # `a b` in order out of 2 and 4: precision 1, recall 1/2: F = 2/3
    ("rouge_l", "alpha beta", ["alpha x beta y"], 2 / 3),
    ("rouge_l", "beta alpha", ["alpha beta"], 1 / 2),
    ("rouge_l", "zero", ["alpha beta"], 0),
    ("retrieval", "Paragraph 7", ["Paragraph 7"], 1),
    ("retrieval", "Paragraph 7, or perhaps 17 or 7", ["Paragraph 7"], 2 / 3),
    ("retrieval", "I cannot say", ["Paragraph 7"], 0),
    ("count", "There are 12 of 13", ["12"], 1 / 2),
    ("count", "12", ["12"], 1),
    ("count", "twelve", ["12"], 0),
    # 2 * 8 matching characters of 8 + 9 = 17: 94 %
    ("code_similarity", "return x\nmore", ["return x;"], 0.94),
    ("code_similarity", "\n```python\n# comment\nint a = 1", ["int a = 1"], 1),
    ("code_similarity", "// only", ["x"], 0),
]


@pytest.mark.parametrize(("metric", "text", "answers", "expected"), CASES)
def test_by_hand(metric: str, text: str, answers: list[str], expected: float) -> None:
    assert scored(metric, text, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Location", 1),
        ("Location or Date", 1 / 2),
        ("City", 0),
        ("nothing of the kind", 0),
    ],
)
def test_classification(text: str, expected: float) -> None:
    assert scored("classification", text, "Location", meta={"all_classes": CLASSES}) == expected


def test_a_class_whose_name_is_part_of_the_right_one() -> None:
    right = "Invention, book and other creative piece"
    assert scored("classification", right, right, meta={"all_classes": CLASSES}) == 1
    # the other way round the longer name does count
    assert scored("classification", right, "Invention", meta={"all_classes": CLASSES}) == 1 / 2


def test_only_the_first_line() -> None:
    assert scored("f1", "\nParis\nQuestion: next", "Paris", first_line=True) == 1
    assert scored("f1", "\nParis\nQuestion: next", "Paris") == 1 / 2


def test_every_metric_has_a_case() -> None:
    assert set(METRICS) == {metric for metric, *_ in CASES} | {"classification"}
