"""The cells of a sweep: each is what one row of a table asks of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.accuracy.config import Sweep

NAMES = {"streaming_llm": "SLM", "h2o": "H2O", "snapkv": "SnapKV"}  # the paper's
REUSE_OFF = 2.0


@dataclass(frozen=True)
class Cell:
    """policy None: full KV. thresholds and recall None: evicted only. recall: settings of recall by pages. stored:
    settings of how evicted KV is stored and read.

    fields: what the request carries beside the prompt.
    """

    policy: str | None = None
    budget: int | None = None
    thresholds: tuple[float, float] | None = None
    gate: str = "group"
    calibration_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    recall: dict[str, Any] | None = field(default=None, hash=False)
    stored: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def fields(self) -> dict[str, Any]:
        if self.policy is None:
            return {}
        fields: dict[str, Any] = {"kv_budget": self.budget, "kv_policy": self.policy, **self.extra}
        if self.recall is not None:
            return fields | {"kv_recall": "pages", **self.recall}
        if self.thresholds is None:
            return fields | {"kv_calibration": False}
        theta1, theta2 = self.thresholds
        fields |= {"kv_theta1": theta1, "kv_theta2": theta2, "kv_gate": self.gate}
        if self.calibration_size is not None:
            fields["kv_calibration_size"] = self.calibration_size
        return fields | self.stored

    @property
    def id(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.fields.items()) or "full"

    @property
    def label(self) -> str:
        if self.policy is None:
            return "FullKV"
        if self.recall is not None:
            return "+pages" + "".join(f" {name.removeprefix('kv_recall_')} {v}" for name, v in self.recall.items())
        if self.thresholds is None:
            return NAMES[self.policy]
        theta1, theta2 = self.thresholds
        label = f"+CaliDrop {_short(theta1)}/" + ("–" if theta2 >= REUSE_OFF else _short(theta2))
        if self.gate != "group":
            label += f" {self.gate}"
        if self.calibration_size is not None:
            label += f" size {self.calibration_size}"
        return label + "".join(f" {_stored_label(name, value)}" for name, value in self.stored.items())


def _stored_label(name: str, value: Any) -> str:
    return str(value) if name == "kv_codec" else f"{name.removeprefix('kv_').replace('_', ' ')} {value}"


def _short(theta: float) -> str:
    return f"{theta:.2f}".replace("0.", ".", 1)


def cells_of(sweep: Sweep) -> list[Cell]:
    """Every cell once, in the order of the tables."""
    pairs = [*sweep.thresholds, *((theta1, REUSE_OFF) for theta1 in sweep.reuse_off)]
    with_thresholds = sweep.policies if sweep.threshold_policies is None else sweep.threshold_policies
    cells = [Cell()] if sweep.full else []
    for budget in sweep.budgets:
        for policy in sweep.policies:
            if sweep.evicted_only:
                cells.append(Cell(policy, budget, extra=sweep.extra))
            for gate in sweep.gates:
                for size in sweep.calibration_sizes:
                    number = None if size == "all" else size
                    if policy in with_thresholds:
                        cells += [Cell(policy, budget, pair, gate, number, sweep.extra) for pair in pairs]
            for stored in sweep.stored:
                others = {name: value for name, value in stored.items() if name != "kv_calibration_size"}
                number = stored.get("kv_calibration_size")
                cells += [Cell(policy, budget, pair, "group", number, sweep.extra, stored=others) for pair in pairs]
            cells += [Cell(policy, budget, extra=sweep.extra, recall=recall) for recall in sweep.recall]
    for budget in sweep.evicted_only_budgets:
        cells += [Cell(policy, budget, extra=sweep.extra) for policy in sweep.policies]
    assert len({cell.id for cell in cells}) == len(cells), "the sweep names a cell twice"
    return cells
