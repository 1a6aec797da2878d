"""What the server's operator may preset, and how a request's fields and those defaults become one complete record.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_calidrop.settings.request import (
    LimitError,
    OnFull,
    PositiveCount,
    RequestSettings,
    Rest,
    SettingsError,
    Threshold,
    is_ours,
    settings_error,
    unknown_name,
)

CONFIG_KEY = "calidrop"  # in --additional-config
RESTS = get_args(Rest)  # from the least memory to the most


class ServerSettings(BaseModel):
    """The operator's settings: limits of the server, and defaults for the requests that do not say otherwise.

    min_, max_budget: of the budgets that requests give; allow_full: whether they may keep full KV. min_, max_theta: of
    both thresholds. on_full: the values of `kv_on_full` they may ask for, null: all. sketch_rest: the richest
    `kv_recall_rest` they may ask for, because sketch blocks have room for its coded values. Defaults are held to all of
    it.

    Given as `--additional-config '{"calidrop": {"swap_bytes": ..., "kv_budget": ..., ...}}'`: one flat object.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    swap_bytes: Annotated[int, Field(ge=0)] | None = None
    sketch_bytes: Annotated[int, Field(ge=0)] | None = None
    sketch_rest: Rest = "v2"
    buffer_bytes: Annotated[int, Field(ge=0)] | None = None
    prefill_state_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    min_budget: PositiveCount | None = None
    max_budget: PositiveCount | None = None
    min_theta: Threshold | None = None
    max_theta: Threshold | None = None
    on_full: list[OnFull] | None = None
    allow_full: bool = True
    request_defaults: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Self:
        """Read `VllmConfig.additional_config`; anything wrong is a ValueError that names the field."""
        given = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise SettingsError(f'additional_config["{CONFIG_KEY}"] must be an object, got {given!r}', CONFIG_KEY)
        defaults = {name: value for name, value in given.items() if name in RequestSettings.model_fields}
        own = {name: value for name, value in given.items() if name not in defaults}
        unknown = sorted(set(own) - (set(cls.model_fields) - {"request_defaults"}))
        if unknown:
            known = sorted((set(cls.model_fields) - {"request_defaults"}) | set(RequestSettings.model_fields))
            raise SettingsError(
                f"unknown server setting {unknown[0]!r} of calidrop; known are {', '.join(known)}", unknown[0]
            )
        try:
            server = cls(**own, request_defaults=defaults)
            resolve_request({}, server)
        except ValidationError as error:
            raise settings_error(error, "server setting of calidrop: ") from None
        except SettingsError as error:
            raise SettingsError(f"server setting of calidrop: {error}", *error.fields, value=error.value) from None
        return server

    def limits(self) -> dict[str, Any]:
        """What requests are held to; null: not limited."""
        return {
            "min_budget": self.min_budget,
            "max_budget": self.max_budget,
            "min_theta": self.min_theta,
            "max_theta": self.max_theta,
            "on_full": self.on_full or list(get_args(OnFull)),
            "allow_full": self.allow_full,
            "recall_rest": self.sketch_rest,
        }

    def check(self, request: RequestSettings) -> None:
        """LimitError where the request is outside of what the operator allows."""
        if not self.allow_full and not request.compresses:
            field = "kv_budget" if request.kv_budget is None else "kv_policy"
            value = getattr(request, field)
            raise LimitError(f"{field} ({value}) keeps full KV, which this server does not allow", field, value=value)
        bounds = {
            "kv_budget": (self.min_budget, self.max_budget),
            "kv_theta1": (self.min_theta, self.max_theta),
            "kv_theta2": (self.min_theta, self.max_theta),
        }
        for field, (least, most) in bounds.items():
            value = getattr(request, field)
            if value is not None and least is not None and value < least:
                raise LimitError(f"{field} ({value}) must not be below this server's {least}", field, value=value)
            if value is not None and most is not None and value > most:
                raise LimitError(f"{field} ({value}) must not be above this server's {most}", field, value=value)
        if RESTS.index(request.kv_recall_rest) > RESTS.index(self.sketch_rest):
            raise LimitError(
                f"kv_recall_rest ({request.kv_recall_rest}) must not be above this server's {self.sketch_rest}: its "
                "sketch blocks have no room for such values (sketch_rest)",
                "kv_recall_rest",
                value=request.kv_recall_rest,
            )
        if self.on_full is not None and request.kv_on_full not in self.on_full:
            allowed = ", ".join(self.on_full)
            raise LimitError(
                f"kv_on_full ({request.kv_on_full}) must be one of this server's: {allowed}",
                "kv_on_full",
                value=request.kv_on_full,
            )

    def with_defaults(self, given: Mapping[str, Any]) -> Self:
        """These settings with other defaults of requests; null takes the table's. SettingsError where they are bad."""
        defaults = {name: value for name, value in given.items() if value is not None}
        server = self.model_copy(update={"request_defaults": defaults})
        resolve_request({}, server)
        return server


def resolve_request(raw: Mapping[str, Any], server: ServerSettings) -> RequestSettings:
    """Each field falls back alone: request, server default, table. Names that are not ours are passed over."""
    asked = {name: value for name, value in raw.items() if is_ours(name)}
    for name, value in asked.items():
        if name not in RequestSettings.model_fields:
            raise unknown_name(name, value)
    try:
        settings = RequestSettings.model_validate({**server.request_defaults, **asked})
    except ValidationError as error:
        raise settings_error(error).blame(asked) from None
    server.check(settings)
    return settings
