"""The routes under /calidrop (docs/server.md). They show and pass on; what a field means is decided elsewhere."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, RedirectResponse
from prometheus_client import generate_latest
from starlette.staticfiles import StaticFiles
from vllm.entrypoints.serve.instrumentator.metrics import PrometheusResponse
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as vllm_version

from vllm_calidrop.hooks.api.input_processor import bad_value
from vllm_calidrop.settings.request import SettingsError

from .engines import Engines
from .held import held_by, model_shape
from .keys import admin, reader
from .openapi import CHANGES_BODY, HELD_BODY, field_schemas

PAGE = Path(__file__).parent / "static"
# Beside the package where it is installed, in the repository where it runs from a checkout.
DOCS = next((path for path in (PAGE.parent / "docs", PAGE.parents[1] / "docs") if path.is_dir()), None)

router = APIRouter(prefix="/calidrop", tags=["calidrop"])


def engines_of(request: Request) -> Engines:
    engines: Engines | None = request.app.state.calidrop
    if engines is None:
        raise HTTPException(404, "The attention backend of this server is not calidrop")
    return engines


AnyEngines = Annotated[Engines, Depends(engines_of)]


@router.get("/config", dependencies=[Depends(reader)], summary="Defaults, limits and sizes in force")
async def config(request: Request, engines: AnyEngines) -> dict[str, Any]:
    settings = engines.settings
    vllm_config = engines.client.vllm_config
    parallel = vllm_config.parallel_config
    return {
        "version": version("vllm-calidrop"),
        "vllm": vllm_version,
        "model": request.app.state.openai_serving_models.model_name(),
        "max_model_len": vllm_config.model_config.max_model_len,
        "block_size": engines.block_size,
        "api_servers": parallel._api_process_count,
        "data_parallel_size": parallel.data_parallel_size,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "defaults_version": settings.version,
        "defaults": settings.resolved(),
        "limits": settings.settings.limits(),
        "fields": field_schemas(),
        "admin": request.app.state.calidrop_keys.has_admin,
        "refresh_seconds": engines.refresh_seconds,
        "chat": bool(request.app.state.args.chat_template) or _has_chat_template(engines),
    }


@router.get("/stats", dependencies=[Depends(reader)], summary="What lives now, and totals since the start")
async def stats(engines: AnyEngines) -> dict[str, Any]:
    reading = await engines.recent()
    return {
        "defaults_version": engines.settings.version,
        "age_seconds": round(reading.age, 3),
        "engines": reading.engines,
    }


@router.post(
    "/held",
    dependencies=[Depends(reader)],
    summary="What one request held, against full KV",
    openapi_extra=HELD_BODY,
)
async def held(request: Request, engines: AnyEngines) -> dict[str, Any]:
    asked = await _object_of(request)
    config = engines.client.vllm_config
    reading = await engines.recent()
    try:
        return held_by(
            asked,
            model_shape(config),
            config.cache_config.block_size,
            engines.settings.settings,
            reading.engines[0],
            config.parallel_config.tensor_parallel_size,
        )
    except SettingsError as error:
        raise bad_value(str(error), error.field, error.value) from None


@router.post(
    "/defaults",
    dependencies=[Depends(admin)],
    summary="Change the defaults of requests",
    openapi_extra=CHANGES_BODY,
)
async def change_defaults(request: Request, engines: AnyEngines) -> dict[str, Any]:
    settings = await engines.change_defaults(await _object_of(request))
    return {"defaults_version": settings.version, "defaults": settings.resolved()}


def _has_chat_template(engines: Engines) -> bool:
    """Whether the model's tokenizer can turn messages into a prompt. A server without a tokenizer has none."""
    if engines.client.vllm_config.model_config.skip_tokenizer_init:
        return False
    return bool(getattr(engines.client.get_tokenizer(), "chat_template", None))


async def _object_of(request: Request) -> dict[str, Any]:
    """The body as it was sent: pydantic's models would turn a wrong type into something that fits."""
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise bad_value("The body is not JSON", "body") from None
    if not isinstance(body, dict):
        raise bad_value("The body must be an object of kv_* fields", "body")
    return body


def attach_page(app: FastAPI) -> None:
    """The static page, where it is installed."""
    if not (PAGE / "index.html").is_file():
        return

    @app.get("/calidrop", include_in_schema=False)
    async def page() -> RedirectResponse:
        return RedirectResponse("calidrop/")

    documents = {path.name: path for path in DOCS.glob("*.md")} if DOCS else {}

    @app.get("/calidrop/docs/{name}", include_in_schema=False)
    async def document(name: str) -> PlainTextResponse:
        """A document as it was written: browsers would download Markdown."""
        if name not in documents:
            raise HTTPException(404, f"There is no document {name}; there are {', '.join(sorted(documents)) or 'none'}")
        return PlainTextResponse(documents[name].read_text(encoding="utf-8"))

    app.mount("/calidrop", StaticFiles(directory=PAGE, html=True))


def attach_metrics(app: FastAPI) -> None:
    """vLLM's `/metrics` with ours after it; vLLM lets a plugin's route take the place of one of its own."""

    @app.get("/metrics", response_class=PrometheusResponse)
    def metrics(request: Request) -> PrometheusResponse:
        engines: Engines | None = request.app.state.calidrop
        own = b"" if engines is None else generate_latest(engines.registry)
        return PrometheusResponse(generate_latest(get_prometheus_registry()) + own)
