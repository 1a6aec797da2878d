"""The request fields and the report in `/openapi.json` and `/docs`.

The fields are pydantic's schema of RequestSettings, the only list of names. vLLM's request models take unknown fields
or ignore them, and the hooks check ours with the same errors on every route and way of serving; so the models stay
vLLM's and their documentation is extended. vLLM documents no response of these routes: only the report is described.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI

from vllm_calidrop.records import COUNTERS
from vllm_calidrop.settings.request import REPORT_KEY, RequestSettings

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
)
_REPORT = "CaliDropReport"
_CHANGES = "CaliDropDefaults"
CHANGES_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_CHANGES}"}}},
    }
}
_HELD = "CaliDropHeld"
HELD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_HELD}"}}},
    }
}
_TOKENS: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


@cache
def field_schemas() -> dict[str, dict[str, Any]]:
    """JSON schema of every request field: type, range, default, meaning."""
    schemas: dict[str, dict[str, Any]] = RequestSettings.model_json_schema()["properties"]
    return schemas


def report_schema() -> dict[str, Any]:
    """JSON schema of one choice's report (docs/server.md)."""
    number = {"type": "integer", "minimum": 0}
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    counted = {name: number for name in COUNTERS}
    per_layer = {name: {"type": "array", "items": number} for name in COUNTERS}
    properties: dict[str, Any] = {
        "prompt_tokens": number,
        "kept": number | {"description": "Prompt tokens kept per KV head."},
        "evicted": number,
        "mode": {"type": "string", "description": "calidrop, evict (without calibration) or full."},
        "reason": text | {"description": "Why not: null where mode is calidrop."},
        "codec": text | {"description": "How the evicted KV is stored; null where none is."},
        **counted,
        "bytes_read": number | {"description": "Of evicted KV, as it is stored."},
        "layers": {
            "type": "object",
            "properties": per_layer,
            "description": "The counters of every layer, once the request is finished.",
        },
    }
    return {
        "type": "object",
        "description": "What was done with the KV of one choice. Counters count decisions: one query head, one step.",
        "properties": properties,
        "required": [name for name in properties if name != "layers"],
    }


def document_fields(app: FastAPI) -> None:
    """From now on the application's OpenAPI document has the fields and the report."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_fields(original())
        return original()

    app.openapi = openapi  # type: ignore[method-assign]


def _add_fields(document: dict[str, Any]) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for route in ROUTES:
        operation = document["paths"].get(route, {}).get("post")
        if operation is not None:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schemas[reference.rpartition("/")[2]]["properties"].update(field_schemas())
            _add_report(operation["responses"]["200"]["content"]["application/json"])
    schemas[_REPORT] = report_schema()
    schemas[_CHANGES] = {
        "type": "object",
        "description": "Those named change; null takes one back to the table's default.",
        "properties": {name: _nullable(schema) for name, schema in field_schemas().items()},
        "additionalProperties": False,
    }
    schemas[_HELD] = {
        "type": "object",
        "description": "An answered request: its lengths, the mode of its report and the fields it was sent with.",
        "properties": {
            "prompt_tokens": _TOKENS,
            "answer_tokens": _TOKENS,
            "mode": {"type": "string", "enum": ["calidrop", "evict", "full"], "default": "calidrop"},
            **field_schemas(),
        },
        "required": ["prompt_tokens", "answer_tokens"],
    }


def _add_report(content: dict[str, Any]) -> None:
    report = {"anyOf": [{"$ref": f"#/components/schemas/{_REPORT}"}, {"type": "null"}]}
    content["schema"] = {
        "type": "object",
        "description": f"vLLM's response, and `{REPORT_KEY}`: a report per choice, in the order of the choices.",
        "properties": {REPORT_KEY: {"type": "array", "items": report}},
        "additionalProperties": True,
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return schema
    documentation = ("title", "description", "default")
    nullable: dict[str, Any] = {name: schema[name] for name in documentation if name in schema}
    rest = {name: value for name, value in schema.items() if name not in documentation}
    return nullable | {"anyOf": [rest, {"type": "null"}]}
