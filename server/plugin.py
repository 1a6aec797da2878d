"""The entry point `vllm.endpoint_plugins: calidrop`: vLLM's own interface for routes beside its own.

vLLM calls `attach_router` while it builds the application, in every API process, and `init_state` when the engines are
there. With another attention backend the routes are there and say so; nothing else is touched.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_calidrop.selection import is_selected

from . import openapi, routes
from .body_limit import BodyLimit
from .engines import Engines
from .keys import Keys
from .options import Options


class CaliDropEndpoints:
    """vLLM's EndpointPlugin."""

    name = "calidrop"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.options = Options.from_environment()

    def attach_router(self, app: FastAPI) -> None:
        app.state.calidrop = None
        app.state.calidrop_options = self.options
        app.state.calidrop_keys = Keys(app.state.args, self.options.admin_key)
        app.include_router(routes.router)
        routes.attach_page(app)
        routes.attach_metrics(app)
        openapi.document_fields(app)
        app.add_middleware(BodyLimit, limit=self.options.max_body_bytes)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is not None and is_selected(engine_client.vllm_config):
            state.calidrop = await Engines.connect(engine_client, self.options.refresh_seconds)
