"""LongBench (arXiv 2308.14508), English part, from its official jsonl files in a folder.

The prompts say what the official ones say, in our words. As there, a prompt too long for the model loses its middle,
and few-shot and code tasks are asked without a chat template in chat mode too. Score: the official metric of each
data set.

Options: folder (holds hotpotqa.jsonl, ..), max_tokens (the model's window; what does not fit beside the reply and 64
tokens of chat template is cut from the middle). `lengths` is not used; `names`: data sets, default the paper's 13.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tokens import Tokens

TEMPLATE_ROOM = 64


class DataSet(NamedTuple):
    """prompt: with {context} and {input}; reply: tokens of the answer; raw: no chat template; first_line: only that
    counts."""

    prompt: str
    metric: str
    reply: int
    raw: bool = False
    first_line: bool = False


_SHORT = "Reply with the answer alone, no explanation."
_PASSAGES = (
    "Here are some passages. Use them to answer the question after them. "
    + _SHORT
    + "\n\n{context}\n\nThe question, to be answered from the passages above: {input}\n"
    + _SHORT
    + "\nAnswer:"
)

DATA_SETS = {
    "narrativeqa": DataSet(
        "Here is a story, a novel or a script, and a question about it. Answer as briefly as you can, with a phrase "
        "if possible, and explain nothing.\n\nStory: {context}\n\nAnswer the question from the story as briefly as "
        "you can, with a phrase if possible, and explain nothing.\n\nQuestion: {input}\n\nAnswer:",
        "f1",
        128,
    ),
    "qasper": DataSet(
        "Here is a scientific article and a question about it. Answer as briefly as you can, with a phrase or a "
        'sentence. If the article does not answer it, write "unanswerable". A question to be answered by yes or no '
        'is answered by "yes", "no" or "unanswerable". Explain nothing.\n\nArticle: {context}\n\nAnswer from the '
        'article, by the same rules: briefly, "unanswerable" where it does not say, "yes" or "no" where that is '
        "asked, no explanation.\n\nQuestion: {input}\n\nAnswer:",
        "f1",
        128,
    ),
    "multifieldqa_en": DataSet(
        "Read this text and answer briefly.\n\n{context}\n\nNow answer this question from the text above. "
        + _SHORT
        + "\n\nQuestion: {input}\nAnswer:",
        "f1",
        64,
    ),
    "hotpotqa": DataSet(_PASSAGES, "f1", 32),
    "2wikimqa": DataSet(_PASSAGES, "f1", 32),
    "musique": DataSet(_PASSAGES, "f1", 32),
    "gov_report": DataSet(
        "Here is a report by a government agency. Summarise it in one page.\n\nReport:\n{context}\n\nNow the summary, "
        "one page long.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "qmsum": DataSet(
        "Here is the transcript of a meeting and a question or task about it. Answer in one or a few "
        "sentences.\n\nTranscript:\n{context}\n\nNow answer it from the transcript, in one or a few "
        "sentences.\n\nQuestion: {input}\nAnswer:",
        "rouge_l",
        512,
    ),
    "multi_news": DataSet(
        "Here are several news articles. Summarise all of them in one page.\n\nArticles:\n{context}\n\nNow one summary "
        "of all the articles.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "trec": DataSet(
        "Say of which type the last question is. Examples come first.\n\n{context}\n{input}",
        "classification",
        64,
        raw=True,
        first_line=True,
    ),
    "triviaqa": DataSet(
        "Answer the last question from the passage before it, with the answer alone. Examples come "
        "first.\n\n{context}\n\n{input}",
        "f1",
        32,
        raw=True,
        first_line=True,
    ),
    "samsum": DataSet(
        "Summarise the last dialogue in a few short sentences. Examples come first.\n\n{context}\n\n{input}",
        "rouge_l",
        128,
        raw=True,
        first_line=True,
    ),
    "passage_count": DataSet(
        "Below are numbered paragraphs; some of them may be copies of others. Compare them carefully and find out how "
        "many different ones there are, each counted once.\n\n{context}\n\nGive the number of different paragraphs as "
        "a numeral alone, such as 1, 2 or 3.\n\nThe number is:",
        "count",
        32,
    ),
    "passage_retrieval_en": DataSet(
        "Below are 30 paragraphs and a summary of one of them. Find out which one it "
        'summarises.\n\n{context}\n\nThe summary:\n\n{input}\n\nReply with the paragraph\'s name: "Paragraph 1", '
        '"Paragraph 2" and so on.\n\nThe answer is:',
        "retrieval",
        32,
    ),
    "lcc": DataSet("Continue the code below.\n{context}The next line of code:\n", "code_similarity", 64, raw=True),
    "repobench-p": DataSet(
        "Continue the code below.\n{context}{input}The next line of code:\n", "code_similarity", 64, raw=True
    ),
}
# The tables of the CaliDrop paper, in their order.
PAPER = (
    "multifieldqa_en qasper hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p"
).split()


def samples(entry: Tasks, tokens: Tokens) -> list[Sample]:
    """The first `count` rows of each data set."""
    folder = entry.options.get("folder")
    if folder is None or not Path(folder).is_dir():
        raise SystemExit(f"longbench: options.folder must hold the official jsonl files, got {folder!r}")
    return [
        sample
        for name in entry.names or PAPER
        for sample in read_set(name, Path(folder), entry.count, entry.options.get("max_tokens"), tokens)
    ]


def _filled(prompt: str, row: dict[str, Any]) -> str:
    """One pass: the texts hold braces of their own."""
    return re.sub(r"\{(context|input)\}", lambda field: str(row[field[1]]), prompt)


def read_set(name: str, folder: Path, most: int, window: int | None, tokens: Tokens) -> Iterator[Sample]:
    data_set = DATA_SETS[name]
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for index, line in zip(range(most), lines):
            row = json.loads(line)
            prompt = _filled(data_set.prompt, row)
            if window is not None:
                prompt = tokens.truncate_middle(prompt, window - data_set.reply - TEMPLATE_ROOM)
            yield Sample(
                task=name,
                length=0,
                index=index,
                prompt=prompt,
                answers=row["answers"],
                metric=data_set.metric,
                max_tokens=data_set.reply,
                raw=data_set.raw,
                first_line=data_set.first_line,
                meta={"id": row.get("_id"), "all_classes": row.get("all_classes")},
            )
