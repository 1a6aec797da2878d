"""Documents and questions about them: our own JSON, SQuAD's, or HotpotQA's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.haystack import DATA


@dataclass(frozen=True)
class QaItem:
    """documents: indices of those that answer it, all of them needed."""

    question: str
    answers: list[str]
    documents: list[int]


@dataclass(frozen=True)
class QaData:
    documents: list[str]
    questions: list[QaItem]


@cache
def load_qa(name: str, path: str | None) -> QaData:
    raw = json.loads((Path(path) if path else DATA / f"{name}.json").read_text(encoding="utf-8"))
    if isinstance(raw, list):
        return _hotpot(raw)
    if "data" in raw:
        return _squad(raw)
    documents = [f"{document['title']}\n{document['text']}" for document in raw["documents"]]
    return QaData(documents, [QaItem(**item) for item in raw["questions"]])


def _squad(raw: dict[str, Any]) -> QaData:
    """One question per paragraph and answerable questions only; each answer once."""
    documents: list[str] = []
    questions: list[QaItem] = []
    for article in raw["data"]:
        for paragraph in article["paragraphs"]:
            documents.append(f"{article['title']}\n{paragraph['context']}")
            for item in paragraph["qas"]:
                if item.get("is_impossible"):
                    continue
                answers = list(dict.fromkeys(answer["text"] for answer in item["answers"]))
                questions.append(QaItem(item["question"], answers, [len(documents) - 1]))
    return QaData(documents, questions)


def _hotpot(raw: list[dict[str, Any]]) -> QaData:
    documents: dict[str, int] = {}
    questions: list[QaItem] = []
    for item in raw:
        places = {}
        for title, sentences in item["context"]:
            places[title] = documents.setdefault(f"{title}\n{''.join(sentences)}", len(documents))
        titles = dict.fromkeys(title for title, _ in item["supporting_facts"])
        needed = [places[title] for title in titles if title in places]
        questions.append(QaItem(item["question"], [item["answer"]], needed))
    return QaData(list(documents), questions)
