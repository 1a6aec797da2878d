"""What a request may ask for, and the defaults that depend on the budget."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("snapkv", "h2o", "streaming_llm", "full")
GATES = ("group", "head", "group_mean")
RESTS = ("none", "v1", "v2")
BALANCE_QUERIES = 32


@dataclass(frozen=True)
class Settings:
    """Settings of one request; names and defaults are those of the serving API.

    ``kv_calibration_size``: evicted tokens kept on the host per KV head, the most important first by the
    policy's own score; the others are lost for good. None keeps all of them, 0 is the same as
    ``kv_calibration=False``. ``kv_codec``: how they are stored (codecs.py). ``kv_read_budget``: bytes that may be
    read again per step, an even part for every layer; None: no bound.
    """

    kv_budget: int | None = None
    kv_policy: str = "snapkv"
    kv_theta1: float = 0.7
    kv_theta2: float = 0.85
    kv_gate: str = "group"
    kv_calibration: bool = True
    kv_calibration_size: int | None = None
    kv_window: int | None = None
    kv_pool_kernel: int = 5
    kv_sinks: int | None = None
    kv_codec: str = "none"
    kv_read_budget: int | None = None
    kv_recall: str = "all"
    kv_recall_rest: str = "none"
    kv_recall_theta: float | None = None
    kv_recall_buffer: int = 0
    kv_recall_eps: float | None = None
    kv_recall_top_p: float | None = None
    kv_recall_pages: int | None = None

    def __post_init__(self) -> None:
        if self.kv_policy not in POLICIES:
            raise ValueError(f"kv_policy must be one of {POLICIES}, got {self.kv_policy!r}")
        if self.kv_gate not in GATES:
            raise ValueError(f"kv_gate must be one of {GATES}, got {self.kv_gate!r}")
        if self.kv_recall_rest not in RESTS:
            raise ValueError(f"kv_recall_rest must be one of {RESTS}, got {self.kv_recall_rest!r}")
        if not self.kv_theta1 <= self.kv_theta2:
            raise ValueError(f"kv_theta1 {self.kv_theta1} must not exceed kv_theta2 {self.kv_theta2}")
        if self.kv_calibration_size is not None and self.kv_calibration_size < 0:
            raise ValueError("kv_calibration_size must not be negative")
        if self.kv_pool_kernel < 1:
            raise ValueError("kv_pool_kernel must be at least 1")
        if self.kv_budget is not None:
            if self.kv_budget < 1:
                raise ValueError("kv_budget must be at least 1")
            if not 1 <= self.window <= self.kv_budget:
                raise ValueError(f"kv_window {self.kv_window} must lie in [1, kv_budget]")
            if not 0 <= self.sinks <= self.kv_budget:
                raise ValueError(f"kv_sinks {self.kv_sinks} must lie in [0, kv_budget]")

    @property
    def budget(self) -> int:
        assert self.kv_budget is not None
        return self.kv_budget

    @property
    def window(self) -> int:
        """SnapKV's observation window; part of the budget."""
        return max(1, min(32, self.budget // 2)) if self.kv_window is None else self.kv_window

    @property
    def sinks(self) -> int:
        """StreamingLLM's sinks; part of the budget."""
        return min(32, self.budget // 2) if self.kv_sinks is None else self.kv_sinks

    @property
    def has_rest(self) -> bool:
        """Whether evicted tokens that are not read are attended from their codes."""
        return self.kv_recall_rest != "none"

    @property
    def recall_theta(self) -> float:
        """A head looks when a query's cosine to the one of its last look is below this."""
        if self.kv_recall_theta is not None:
            return self.kv_recall_theta
        return 2.0 if self.has_rest else 0.9

    @property
    def recall_eps(self) -> float:
        """Pages of no larger share are not read."""
        if self.kv_recall_eps is not None:
            return self.kv_recall_eps
        if self.has_rest:
            return 0.1
        return 0.05 if self.kv_recall_buffer else 0.02

    @property
    def recall_pages(self) -> int:
        """At most this many pages are wanted in a look."""
        if self.kv_recall_pages is not None:
            return self.kv_recall_pages
        return 4 if self.kv_recall_top_p is None else 64

    def evicts(self, prompt_tokens: int) -> bool:
        """A prompt no longer than the budget is never touched."""
        return self.kv_budget is not None and self.kv_policy != "full" and prompt_tokens > self.kv_budget

    def host_tokens(self, evicted: int) -> int:
        """How many of a KV head's evicted tokens stay readable."""
        if not self.kv_calibration:
            return 0
        return evicted if self.kv_calibration_size is None else min(evicted, self.kv_calibration_size)
