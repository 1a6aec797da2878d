"""The served model's tokenizer, as the tasks need it: counts and cuts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Tokens:
    """Loaded when first used: suites that count words themselves need none."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    @cached_property
    def _tokenizer(self) -> Any:
        if self.name is None:
            raise SystemExit("these tasks need the served model's tokenizer: server.tokenizer or --tokenizer")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name)
        tokenizer.model_max_length = 1 << 40  # what is counted is not yet a prompt
        return tokenizer

    def count(self, text: str) -> int:
        """Without special tokens."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def truncate_middle(self, text: str, limit: int) -> str:
        """At most `limit` tokens: the first and the last half of them. The text itself is cut, never rewritten."""
        spans = self._spans(text)
        if len(spans) <= limit:
            return text
        half = limit // 2
        return text[: spans[half - 1][1]] + text[spans[len(spans) - (limit - half)][0] :]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token lies in the text."""
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(coded.offset_mapping)


def fit(build: Callable[[int], str], limit: int, count: Callable[[str], int], most: int | None = None) -> int:
    """The largest n (of at most `most`) whose text is no longer than `limit` tokens; texts grow with n."""
    if count(build(0)) > limit:
        raise ValueError(f"the question alone is longer than {limit} tokens: ask for a longer context")
    low, high = 0, 64
    while (most is None or high < most) and count(build(high)) <= limit:
        low, high = high, 2 * high
    if most is not None and high >= most:
        high = most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if count(build(middle)) <= limit:
            low = middle
        else:
            high = middle
    return low
