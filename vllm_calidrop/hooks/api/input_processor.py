"""Wraps `InputProcessor`: every request of an engine passes here, offline, HTTP or anything else.

Why: it is the only place that has both the request's parameters and the engine's own `VllmConfig` (a process may hold
several engines), so each request's complete record is made in `process_inputs`, from the operator's defaults, which are
read from that configuration when they are first asked for. The record goes on the request-local copy of the parameters:
the caller's own object is never changed, may be shared by requests and engines, and a record that the caller puts there
is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.api import refusals
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import wrap_method
from vllm_calidrop.selection import is_selected
from vllm_calidrop.settings.defaults import VersionedSettings
from vllm_calidrop.settings.request import RECORD_KEY, REPORT_KEY, LimitError, RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings, resolve_request
from vllm_calidrop.support import refuse_settings

_ATTRIBUTE = "calidrop_server_settings"

# Names of ours that a caller may not give, and what they are.
NOT_SETTINGS = {
    REPORT_KEY: "it is the report of a response",
    RECORD_KEY: "it is where the server puts the complete settings",
}


def install() -> None:
    when_imported("vllm.v1.engine.input_processor", _wrap)


def server_settings(input_processor: Any) -> ServerSettings | None:
    """The operator's settings of this engine; None when it does not use the CALIDROP backend."""
    versioned = versioned_settings(input_processor)
    return versioned.settings if versioned is not None else None


def versioned_settings(input_processor: Any) -> VersionedSettings | None:
    """The operator's settings of this engine with the version of their defaults; None without the backend."""
    if not hasattr(input_processor, _ATTRIBUTE):
        config = input_processor.vllm_config
        server = None
        if is_selected(config):
            server = VersionedSettings(1, ServerSettings.from_additional_config(config.additional_config))
        setattr(input_processor, _ATTRIBUTE, server)
    versioned: VersionedSettings | None = getattr(input_processor, _ATTRIBUTE)
    return versioned


def apply_defaults(input_processor: Any, version: int, given: Mapping[str, Any]) -> VersionedSettings:
    """From now on requests get these defaults, as the engine process has them. An older version changes nothing."""
    versioned = versioned_settings(input_processor)
    assert versioned is not None
    if version > versioned.version:
        versioned = versioned.at(version, given)
        setattr(input_processor, _ATTRIBUTE, versioned)
    return versioned


def settings_or_400(asked: Mapping[str, Any], server: ServerSettings) -> RequestSettings:
    """Resolve a request's names; anything wrong becomes the HTTP 400 that names the field."""
    for name, what in NOT_SETTINGS.items():
        if name in asked:
            raise bad_request(f"{name} is not a setting: {what}", name)
    try:
        settings = resolve_request(asked, server)
        refuse_settings(settings)
        return settings
    except SettingsError as error:
        reason: refusals.Reason = "limit" if isinstance(error, LimitError) else "invalid"
        raise bad_request(str(error), error.field, error.value, reason) from None


def bad_request(message: str, parameter: str, value: Any = None, reason: refusals.Reason = "invalid") -> Exception:
    """The error of `bad_value` for a request, which is counted as refused."""
    refusals.refused(reason)
    return bad_value(message, parameter, value)


def bad_value(message: str, parameter: str, value: Any = None) -> Exception:
    """vLLM's validation error: a 400 whose JSON has `param`, or the exception an offline caller sees."""
    from vllm.exceptions import VLLMValidationError

    shown = value if len(repr(value)) <= 100 else None  # the message has it already, cut short
    return VLLMValidationError(message, parameter=parameter, value=shown)


def _wrap(module: ModuleType) -> None:
    cls = module.InputProcessor
    wrap_method(cls, "process_inputs", _attaching_record, ("self", "request_id", "prompt", "params"))


def _attaching_record(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.sampling_params import SamplingParams

        server = server_settings(self)
        if server is None or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        settings = settings_or_400(params.extra_args or {}, server)
        if "forced_token_ids" in (params.extra_args or {}):
            from vllm_calidrop.forcing import check_vocabulary

            check_vocabulary(params.extra_args, self.model_config.get_vocab_size())
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if request.resumable and settings.compresses:
            raise bad_request(
                "kv_budget is not supported for streaming input sessions", "kv_budget", settings.kv_budget
            )
        own = request.sampling_params
        own.extra_args = {**(own.extra_args or {}), RECORD_KEY: settings.to_record()}
        return request

    return process_inputs
