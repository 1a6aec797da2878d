"""The served model's tokenizer, as the tasks need it: counts and cuts."""

from __future__ import annotations

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

        return AutoTokenizer.from_pretrained(self.name)

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def truncate_middle(self, text: str, limit: int) -> str:
        """At most `limit` tokens: the first and the last half of them."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return text
        half = limit // 2
        return self.decode(ids[:half]) + self.decode(ids[len(ids) - (limit - half) :])
