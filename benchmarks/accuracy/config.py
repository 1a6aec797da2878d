"""What a run is: one TOML file, validated; unknown names are errors."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Policy = Literal["streaming_llm", "h2o", "snapkv"]
Gate = Literal["group", "head", "group_mean"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Server(_Strict):
    """The server this command starts where no base URL is given; `tokenizer` defaults to the model.

    `model` is a folder, a name that vLLM can load, or a name of `python -m benchmarks.models --list`.
    """

    model: str
    tokenizer: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    start_timeout: float = 600


class Client(_Strict):
    mode: Literal["completion", "chat"] = "completion"
    # Chat mode: where a task's answer prefix goes. `assistant` needs vLLM's continue_final_message.
    answer_prefix: Literal["user", "assistant"] = "user"
    concurrency: int = Field(default=8, ge=1)
    retries: int = Field(default=6, ge=0)
    timeout: float = Field(default=600, gt=0)
    # Seconds that a server of --base-url may take to answer at all: it may be loading its model.
    patience: float = Field(default=600, ge=0)
    temperature: float = 0
    extra_body: dict[str, Any] = {}


class Tasks(_Strict):
    """One suite of tasks; `options` are the suite's own (see its module)."""

    suite: Literal["small", "ruler", "niah", "longbench"]
    names: list[str] = []
    lengths: list[int] = []
    count: int = Field(default=100, ge=1)
    seed: int = 0
    options: dict[str, Any] = {}


class Sweep(_Strict):
    """The cells: full KV, and for every policy, budget (and gate, and calibration size) the evicted-only row and
    one row per pair of thresholds; `reuse_off`: values of theta1 also run with theta2 = 2 (nothing stored is used);
    `threshold_policies`: the policies that have those rows, all by default; `stored`: further rows of each pair of
    thresholds with settings of how evicted KV is stored and read: kv_codec, kv_read_budget, kv_calibration_size
    (docs/swap.md); `recall`: settings of rows that recall by pages (docs/recall.md), `{}` for the defaults;
    `evicted_only_budgets`: further evicted-only rows of every policy, say with the memory that codes take.
    """

    full: bool = True
    policies: list[Policy] = ["streaming_llm", "h2o", "snapkv"]
    budgets: list[int] = [64]
    evicted_only: bool = True
    thresholds: list[tuple[float, float]] = [(0.7, 0.85)]
    reuse_off: list[float] = []
    threshold_policies: list[Policy] | None = None
    gates: list[Gate] = ["group"]
    calibration_sizes: list[int | Literal["all"]] = ["all"]
    stored: list[dict[str, int | str]] = []
    recall: list[dict[str, int | float | str]] = []
    evicted_only_budgets: list[int] = []
    extra: dict[str, Any] = {}


class Config(_Strict):
    name: str
    title: str = ""
    seed: int = 0
    max_minutes: float | None = None
    bootstrap: int = Field(default=2000, ge=100)
    # Of the served model; read from its config.json where that can be found.
    kv_heads: int | None = None
    layout: Literal["policies", "thresholds"] = "policies"
    server: Server | None = None
    client: Client = Client()
    tasks: list[Tasks]
    sweep: Sweep = Sweep()

    @model_validator(mode="after")
    def _something_to_do(self) -> Config:
        if not self.tasks:
            raise ValueError("tasks: at least one suite is needed")
        return self


def load(path: Path) -> Config:
    with path.open("rb") as file:
        return Config.model_validate(tomllib.load(file))
