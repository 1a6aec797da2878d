"""The server's defaults of requests, as they change while it runs.

The truth is in the engine process (of data-parallel rank 0): a change is merged and checked there, so changes that come
through several API processes follow one another. API processes hold copies, told apart by their version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_calidrop.settings.request import RequestSettings, SettingsError, unknown_name
from vllm_calidrop.settings.server import ServerSettings, resolve_request


@dataclass(frozen=True)
class VersionedSettings:
    """The operator's settings in force. version: 1 at the start, one more with every change."""

    version: int
    settings: ServerSettings

    def changed(self, changes: Mapping[str, Any]) -> VersionedSettings:
        """With those defaults changed; null takes one back to the table's. SettingsError where something is wrong."""
        for name, value in changes.items():
            if name not in RequestSettings.model_fields:
                raise unknown_name(name, value)
        try:
            settings = self.settings.with_defaults({**self.settings.request_defaults, **changes})
        except SettingsError as error:
            raise error.blame(changes) from None
        return VersionedSettings(self.version + 1, settings)

    def at(self, version: int, given: Mapping[str, Any]) -> VersionedSettings:
        """This copy brought to what the engine process has."""
        return VersionedSettings(version, self.settings.with_defaults(given))

    def resolved(self) -> dict[str, Any]:
        """What a request without fields gets: every name."""
        return resolve_request({}, self.settings).to_record()

    def as_dict(self) -> dict[str, Any]:
        """What travels to the API processes; `given` are the names that do not have the table's value."""
        return {"version": self.version, "given": dict(self.settings.request_defaults)}
