"""The rows of a comparison: what each asks of the server, read from one TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Row(BaseModel):
    """One way of serving an evicted prompt.

    `settings` are the `kv_*` fields of a request beside the budget and the policy. With `kept_share` s the budget is
    larger: the evicted tokens' share s is kept too, so that rows with the same memory on the device can be compared.
    """

    model_config = ConfigDict(extra="forbid")

    label: str
    settings: dict[str, Any] = {}
    kept_share: float = Field(default=0, ge=0, le=1)


class Rows(BaseModel):
    """All rows, and what they share. `budget` is in prompt tokens kept per KV head."""

    model_config = ConfigDict(extra="forbid")

    policy: str = "snapkv"
    budget: int = Field(default=128, ge=1)
    row: list[Row] = Field(min_length=1)

    def fields(self, row: Row, prompt_tokens: int) -> dict[str, Any]:
        """The request's fields for a prompt of so many tokens."""
        budget = self.budget + round(row.kept_share * max(0, prompt_tokens - self.budget))
        return {"kv_budget": budget, "kv_policy": self.policy, **row.settings}


def load(path: Path) -> Rows:
    rows = Rows.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    labels = [row.label for row in rows.row]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{path}: two rows have the same label")
    return rows
