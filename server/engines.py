"""What an API process knows of its engines: their numbers and the defaults in force, read in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from prometheus_client import CollectorRegistry

from vllm_calidrop.hooks.api.input_processor import apply_defaults, bad_value, versioned_settings
from vllm_calidrop.settings.defaults import VersionedSettings
from vllm_calidrop.settings.request import SettingsError

from .exposition import EngineCollector, count_refusals
from .newest import Newest

logger = logging.getLogger("vllm.calidrop.server")

MAX_AGE_SECONDS = 0.5
READ_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Reading:
    """One read of all engines, in the order of their ranks. at: time.monotonic()."""

    at: float
    engines: list[dict[str, Any]]

    @property
    def age(self) -> float:
        return time.monotonic() - self.at


class Engines:
    """The engines behind one API process. A read costs every engine milliseconds between two steps."""

    def __init__(self, client: Any, refresh_seconds: float) -> None:
        self.client = client
        self.refresh_seconds = refresh_seconds
        self.latest = Reading(float("-inf"), [])
        self.newest = Newest()
        self.block_size = 0
        self.model = str(client.vllm_config.model_config.served_model_name)
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(self.model, self.newest.get, lambda: self.settings.version))
        self._read: asyncio.Task[Reading] | None = None
        self._background: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, client: Any, refresh_seconds: float) -> Engines:
        """The first read is waited for: a process that starts late begins with the defaults in force."""
        engines = cls(client, refresh_seconds)
        await engines.read()
        count_refusals(engines.model)
        engines._background = asyncio.create_task(engines._keep_reading())
        return engines

    @property
    def settings(self) -> VersionedSettings:
        """The operator's settings as this process applies them to requests."""
        versioned = versioned_settings(self.client.input_processor)
        assert versioned is not None
        return versioned

    async def read(self) -> Reading:
        """Read now; those who ask while a read is under way share it. A 503 where the engines are stopping or dead."""
        if self._read is None or self._read.done():
            self._read = asyncio.create_task(self._read_all())
        try:
            return await asyncio.shield(self._read)
        except Exception as error:
            raise HTTPException(503, f"The engines do not answer: {error}", {"Retry-After": "1"}) from error

    async def recent(self) -> Reading:
        """At most MAX_AGE_SECONDS old, or what there is when the engines are in a step that takes longer."""
        if self.latest.age > MAX_AGE_SECONDS:
            try:
                await asyncio.wait_for(self.read(), READ_TIMEOUT_SECONDS)
            except TimeoutError:
                logger.warning("the engines have not answered for %.0f s", READ_TIMEOUT_SECONDS)
        return self.latest

    async def change_defaults(self, changes: dict[str, Any]) -> VersionedSettings:
        """Changed in the engine process and applied here; the 400 that names the field where it was refused.

        Checked here first, against what the engine has now: not everything that JSON can say can be sent to it.
        """
        await self.read()
        try:
            self.settings.changed(changes)
        except SettingsError as error:
            raise bad_value(str(error), error.field, error.value) from None
        core = self.client.engine_core
        answer = await core._call_utility_async("calidrop_change_defaults", changes, engine=core.core_engines[0])
        if refused := answer.get("refused"):
            raise bad_value(refused["message"], refused["field"])
        return apply_defaults(self.client.input_processor, answer["version"], answer["given"])

    async def _read_all(self) -> Reading:
        answers = await self.client.engine_core.call_utility_all_async("calidrop_stats")
        self.latest = Reading(time.monotonic(), [answer["stats"] for answer in answers])
        await asyncio.to_thread(self.newest.put, self.latest.engines)
        # The workers choose it, and the configuration of this process need not know what they chose.
        self.block_size = answers[0]["block_size"]
        defaults = answers[0]["defaults"]
        apply_defaults(self.client.input_processor, defaults["version"], defaults["given"])
        return self.latest

    async def _keep_reading(self) -> None:
        while not self.client.errored:
            await asyncio.sleep(self.refresh_seconds)
            try:
                await self.read()
            except Exception as error:  # a read that failed is tried again; a dead engine ends the server
                logger.debug("reading the engines failed: %r", error)
