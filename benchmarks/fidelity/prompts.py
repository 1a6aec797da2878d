"""The bundled prompts: passages of natural text, a question to each, at any length in the served model's tokens."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).parent / "data"
Split = Literal["tune", "report"]


@dataclass(frozen=True)
class Entry:
    """One entry of data/prompts.toml, which explains the fields."""

    id: str
    kind: str
    split: Split
    text: str
    before: str
    ask: str
    start: str = ""
    needles: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """`token_ids` are what the model sees, chat template and all; `length` is the length asked for, in tokens."""

    id: str
    kind: str
    length: int
    token_ids: list[int]


@cache
def entries() -> tuple[Entry, ...]:
    raw = tomllib.loads((DATA / "prompts.toml").read_text(encoding="utf-8"))["prompt"]
    return tuple(Entry(**item | {"needles": tuple(map(tuple, item.get("needles", [])))}) for item in raw)


def prompts(tokenizer: Any, length: int, split: Split, limit: int | None = None) -> list[Prompt]:
    """The prompts of one split at `length` tokens, kinds in turn, so that the first few are of different kinds.

    `tokenizer` is a Hugging Face tokenizer. A prompt is at most `length` long and ends at a line of its text; where the
    text is too short for the length, the prompt is as long as the text allows.
    """
    of_split = [entry for entry in entries() if entry.split == split]
    nth: dict[str, int] = {}
    ranked = []
    for entry in of_split:
        nth[entry.kind] = nth.get(entry.kind, 0) + 1
        ranked.append((nth[entry.kind], entry))
    ordered = [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]
    return [_prompt(entry, tokenizer, length) for entry in ordered[:limit]]


def _prompt(entry: Entry, tokenizer: Any, length: int) -> Prompt:
    text = (DATA / entry.text).read_text(encoding="utf-8")
    start = text.find(entry.start)
    if start < 0:
        raise ValueError(f"{entry.id}: {entry.text} does not contain {entry.start!r}")
    lines = text[start:].split("\n")
    low, high = 0, len(lines)
    while low < high:  # the most lines that fit
        middle = (low + high + 1) // 2
        if len(_encoded(entry, lines[:middle], tokenizer)) <= length:
            low = middle
        else:
            high = middle - 1
    return Prompt(entry.id, entry.kind, length, _encoded(entry, lines[:low], tokenizer))


def _encoded(entry: Entry, lines: list[str], tokenizer: Any) -> list[int]:
    shown = list(lines)
    for depth, needle in sorted(entry.needles, reverse=True):
        shown.insert(round(depth * len(lines)), needle)
    passage = "\n".join(shown)
    content = f"{entry.before}\n\n{passage}\n\n{entry.ask}"
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{content}\n\nAnswer:").input_ids)
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
