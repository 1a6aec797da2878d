"""What a request may ask for: one complete, validated record of settings.

`RequestSettings.model_fields` is the only list of the request's names. Records are resolved in the API process; engine
and worker processes only read complete ones (`RequestSettings.from_record`). Nothing here imports vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_plain_validator_function

from vllm_calidrop.evicted.layout import MAX_BUFFER

Gate = Literal["group", "head", "group_mean"]
OnFull = Literal["full", "evict", "wait", "reject"]
Recall = Literal["all", "pages"]
Rest = Literal["none", "v1", "v2"]

DEFAULT_WINDOW = 32
DEFAULT_SINKS = 32
DEFAULT_THETA2 = 0.85
# Recall by pages: most pages of a look without and with kv_recall_top_p; eps without and with a buffer, and with a
# rest; the look gate without and with a rest, with which every step looks.
DEFAULT_PAGES, DEFAULT_PAGES_TOP_P = 4, 64
DEFAULT_EPS, DEFAULT_EPS_BUFFER, DEFAULT_EPS_REST = 0.02, 0.05, 0.1
DEFAULT_LOOK_THETA, DEFAULT_LOOK_THETA_REST = 0.9, 2.0
MAX_COUNT = 2**31 - 1  # what the int32 buffers of the workers hold
MAX_BYTES = 2**62

# Names beginning like ours that are vLLM's own (request fields and `extra_args`): they pass untouched.
PREFIX = "kv_"
VLLM_OWN_NAMES = frozenset({"kv_transfer_params", "kv_cache_report_mode", "kv_hints"})
# Where a request's complete settings travel to the engine (in `extra_args`), and where its report stands in responses.
RECORD_KEY = "calidrop_settings"
REPORT_KEY = "calidrop"


class SettingsError(ValueError):
    """A setting that cannot be used. `field` is the name to blame, `value` what was given for it."""

    def __init__(self, message: str, *fields: str, value: Any = None) -> None:
        super().__init__(message)
        self.fields = fields
        self.value = value

    @property
    def field(self) -> str:
        return self.fields[0]

    def blame(self, given: Mapping[str, Any]) -> Self:
        """The same error, naming first the field that `given` itself contains: the one its author can change."""
        first = next((name for name in self.fields if name in given), self.field)
        others = tuple(name for name in self.fields if name != first)
        return type(self)(str(self), first, *others, value=given.get(first, self.value))


class LimitError(SettingsError):
    """A setting that another server would take: this one's operator does not."""


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that the pooled scores stay aligned with their tokens")
    return value


def _half_of_budget(at_most: int, at_least: int) -> Any:
    """Default that shrinks with the budget; without one it is the table's value."""

    def default(data: dict[str, Any]) -> int:
        budget = data.get("kv_budget")
        return at_most if budget is None else max(at_least, min(at_most, budget // 2))

    return default


def _theta2_by_theta1(data: dict[str, Any]) -> float:
    """The table's value, or kv_theta1 if that is above it: then every decision is to read or to merge."""
    return max(DEFAULT_THETA2, data.get("kv_theta1", DEFAULT_THETA2))


def _has_rest(data: dict[str, Any]) -> bool:
    return data.get("kv_recall_rest", "none") != "none"


def _look_theta_by_rest(data: dict[str, Any]) -> float:
    return DEFAULT_LOOK_THETA_REST if _has_rest(data) else DEFAULT_LOOK_THETA


def _eps_by_rest_and_buffer(data: dict[str, Any]) -> float:
    if _has_rest(data):
        return DEFAULT_EPS_REST
    return DEFAULT_EPS_BUFFER if data.get("kv_recall_buffer") else DEFAULT_EPS


def _pages_by_choice(data: dict[str, Any]) -> int:
    return DEFAULT_PAGES if data.get("kv_recall_top_p") is None else DEFAULT_PAGES_TOP_P


def _number(value: Any) -> Any:
    # Strict mode takes an int for a float, but would turn it into inf when it is too large.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_COUNT:
        return math.inf if value > 0 else -math.inf
    return value


class OneOf:
    """Marks a string that must be among `names()`: asked at every validation, because a plugin may register more."""

    def __init__(self, names: Callable[[], list[str]]) -> None:
        self._names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": self._names(), "type": "string"}

    def _checked(self, value: Any) -> Any:
        names = self._names()
        if not isinstance(value, str) or value not in names:
            *others, last = map(repr, names)
            raise ValueError(f"should be {', '.join(others)} or {last}")
        return value


# The registries are imported when a name is asked for: they need torch, which installing the hooks must not import.
def _policies() -> list[str]:
    from vllm_calidrop.algorithm.policies import POLICIES

    return [*POLICIES, "full"]


def _codecs() -> list[str]:
    from vllm_calidrop.evicted.codecs import CODECS

    return list(CODECS)


PolicyName = Annotated[str, OneOf(_policies)]
CodecName = Annotated[str, OneOf(_codecs)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Threshold = Annotated[float, Field(ge=-2.0, le=2.0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_number)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0), BeforeValidator(_number)]


class RequestSettings(BaseModel):
    """One request's complete settings (a null `kv_budget` is full KV, plain vLLM)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    kv_budget: PositiveCount | None = Field(
        default=None,
        description="Prompt tokens kept per KV head; null keeps all (plain vLLM). A shorter prompt is untouched.",
    )
    kv_policy: PolicyName = Field(default="snapkv", description="Which prompt tokens stay; full: all of them.")
    kv_theta1: Threshold = Field(
        default=0.7,
        description="Below this cosine similarity of queries the evicted KV is read again (2: every step, -2: never). "
        "Must not be above kv_theta2. 2 alone equals full KV: evicted KV is read at every step.",
    )
    kv_theta2: Threshold = Field(
        default_factory=_theta2_by_theta1,
        description="Above this similarity the stored attention state is merged; between the two the kept tokens "
        "answer alone.",
    )
    kv_gate: Gate = Field(
        default="group",
        description="Who decides: a KV head's query heads together (group), each alone (head), or by their mean "
        "similarity (group_mean).",
    )
    kv_calibration: bool = Field(
        default=True, description="false: plain eviction; nothing goes to host memory and nothing can be read again."
    )
    kv_calibration_size: Count | None = Field(
        default=None,
        description="Most important evicted tokens that are kept in host memory; null: all, 0: none.",
    )
    kv_on_full: OnFull = Field(
        default="full",
        description="When the host pool is full: keep full KV (full), evict without calibration (evict), queue until "
        "there is room (wait), or answer 503 with Retry-After (reject).",
    )
    kv_codec: CodecName = Field(
        default="none",
        description="How evicted KV lies in host memory: as it is (none), or in 8, 4 or 2 bits with exact outlier "
        "tokens; _plain: without those.",
    )
    kv_read_budget: Annotated[int, Field(ge=0, le=MAX_BYTES)] | None = Field(
        default=None,
        description="Most bytes of evicted KV that a sequence reads again in a step; null: no bound.",
    )
    kv_window: PositiveCount = Field(
        default_factory=_half_of_budget(DEFAULT_WINDOW, 1),
        description="SnapKV's observation window in tokens, at most kv_budget. Default: 32, or half a smaller budget.",
    )
    kv_pool_kernel: Annotated[PositiveCount, AfterValidator(_odd)] = Field(
        default=5, description="Width of SnapKV's average pool over scores; odd."
    )
    kv_sinks: Count = Field(
        default_factory=_half_of_budget(DEFAULT_SINKS, 0),
        description="StreamingLLM's first tokens, at most kv_budget. Default: 32, or half a smaller budget.",
    )
    kv_recall: Recall = Field(
        default="all",
        description="What is read again: all evicted KV of a head, or only the 16-token pages its sketch says matter.",
    )
    kv_recall_rest: Rest = Field(
        default="none",
        description="Recall by pages: evicted tokens that are not read are ignored (none), or attended from coded keys "
        "and values on the device, of 1 (v1) or 2 bits (v2) per channel of a value.",
    )
    kv_recall_theta: Threshold = Field(
        default_factory=_look_theta_by_rest,
        description="Recall by pages: below this similarity the sketch is looked at again. Default: 0.9, or 2 (at "
        "every step) with a rest.",
    )
    kv_recall_buffer: Annotated[Count, Field(le=MAX_BUFFER)] = Field(
        default=0, description="Recall by pages: recalled pages kept per KV head, merged at every step."
    )
    kv_recall_eps: Share = Field(
        default_factory=_eps_by_rest_and_buffer,
        description="Recall by pages: pages of less than this share of the attention are not read. Default: 0.02, 0.05 "
        "with a buffer, 0.1 with a rest.",
    )
    kv_recall_top_p: PositiveShare | None = Field(
        default=None,
        description="Recall by pages: read pages until they hold this share of the evicted attention; null: by number.",
    )
    kv_recall_pages: PositiveCount = Field(
        default_factory=_pages_by_choice,
        description="Recall by pages: most pages of one look. Default: 4, or 64 with kv_recall_top_p.",
    )

    @property
    def compresses(self) -> bool:
        """Whether anything of a long prompt would be evicted."""
        return self.kv_budget is not None and self.kv_policy != "full"

    @property
    def calibrates(self) -> bool:
        """Whether evicted KV goes to the host and is accounted for."""
        return self.compresses and self.kv_calibration and self.kv_calibration_size != 0

    @property
    def rest(self) -> str:
        """How the values of unread evicted tokens are coded: `kv_recall_rest` where pages are recalled at all."""
        return self.kv_recall_rest if self.calibrates and self.kv_recall == "pages" else "none"

    def to_record(self) -> dict[str, Any]:
        """The plain dict that travels to the engine as `extra_args[RECORD_KEY]`."""
        return self.model_dump()

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The settings of a request as resolved by the API process."""
        return cls.model_validate(dict(record))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.kv_theta1 > self.kv_theta2:
            raise SettingsError(
                f"kv_theta1 ({self.kv_theta1}) must not be above kv_theta2 ({self.kv_theta2})",
                "kv_theta1",
                "kv_theta2",
                value=self.kv_theta1,
            )
        for name in ("kv_window", "kv_sinks"):
            value = getattr(self, name)
            if self.kv_budget is not None and value > self.kv_budget:
                raise SettingsError(
                    f"{name} ({value}) must not be above kv_budget ({self.kv_budget})",
                    name,
                    "kv_budget",
                    value=value,
                )
        return self


def is_ours(name: str) -> bool:
    """Whether a request's field name is for us to judge: known, or unknown but beginning like ours in any case."""
    return name.lower().startswith(PREFIX) and name.lower() not in VLLM_OWN_NAMES


def unknown_name(name: str, value: Any) -> SettingsError:
    """The error for a name of ours that is no setting; it says how the name is written if only its case is wrong."""
    if name.lower() in RequestSettings.model_fields:
        return SettingsError(f"{name} is not a setting: names are lower case, send {name.lower()}", name, value=value)
    known = ", ".join(RequestSettings.model_fields)
    return SettingsError(f"unknown setting {name}; known are {known}", name, value=value)


def settings_error(error: ValidationError, prefix: str = "") -> SettingsError:
    # A default that needs a field which itself was refused is reported as well; that entry says nothing.
    first = next(entry for entry in error.errors() if entry["type"] != "default_factory_not_called")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return SettingsError(f"{prefix}{cause}", *cause.fields, value=cause.value)
    field, given = str(first["loc"][0]), repr(first["input"])
    what = str(cause) if cause is not None else first["msg"].removeprefix("Input ")
    shown = given if len(given) <= 100 else f"{given[:100]}..."
    return SettingsError(f"{prefix}{field} {what}, got {shown}", field, value=first["input"])
