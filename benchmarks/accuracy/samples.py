"""One question to a served model, whatever task it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Sample:
    """`prompt` is what completion mode sends, `messages` what chat mode does (default: the prompt as one user turn).

    task: name in the tables; length: the asked context length in tokens (0: whatever the data has)
    index: number within task and length; the same (task, length, index) is the same prompt in every cell
    answers: acceptable answers; their meaning is the metric's
    prefix: how the reply begins; part of the prompt, not of the reply
    raw: asked in completion mode, whatever the mode; first_line: only the reply's first line is scored
    """

    task: str
    length: int
    index: int
    prompt: str
    answers: list[str]
    metric: str
    max_tokens: int
    messages: list[Message] | None = None
    prefix: str = ""
    stop: list[str] | None = None
    raw: bool = False
    first_line: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.task}/{self.length}/{self.index}"
