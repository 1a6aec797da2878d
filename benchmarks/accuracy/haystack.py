"""Long texts to hide things in: an essay or a repeated remark, cut to any number of words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
NOISE = "The kettle is on the stove. The street is quiet. Nobody is waiting. We go out and we come back again."


@cache
def essay(path: str | None) -> tuple[str, ...]:
    """Words of a text file, or of all text files of a folder in the order of their names."""
    source = Path(path) if path else DATA / "essay.txt"
    files = sorted(source.glob("**/*.txt")) if source.is_dir() else [source]
    words = tuple(word for file in files for word in file.read_text(encoding="utf-8").split())
    if not words:
        raise SystemExit(f"no text in {source}")
    return words


NOISE_WORDS = tuple(NOISE.split())


def take(words: Sequence[str], n: int, start: int = 0) -> list[str]:
    """`n` words from `start` on; the text begins again where it ends."""
    start %= len(words)
    repeats = (start + n) // len(words) + 1
    return (list(words) * repeats)[start : start + n]


def insert(words: list[str], sentences: Sequence[str], depths: Sequence[float]) -> str:
    """The words with every sentence at its depth (0: before the first word, 1: after the last), moved back to the
    end of a sentence where one is near (within 1 % of the words, or 4); in the order of the depths."""
    near = max(4, len(words) // 100)
    points = []
    for sentence, depth in sorted(zip(sentences, depths), key=lambda pair: pair[1]):
        wanted = round(depth * len(words))
        ends = (at for at in range(wanted, max(-1, wanted - near), -1) if at == 0 or _ends(words[at - 1]))
        points.append((next(ends, wanted), sentence))
    parts, last = [], 0
    for point, sentence in points:
        parts += [" ".join(words[last:point]), sentence]
        last = point
    parts.append(" ".join(words[last:]))
    return " ".join(part for part in parts if part)


def _ends(word: str) -> bool:
    return bool(re.search(r"[.!?]\W*$", word))
