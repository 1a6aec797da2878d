"""The request fields in `/openapi.json` and `/docs`: pydantic's schema of RequestSettings, the only list of names.

vLLM's request models take unknown fields, and the hooks check ours with the same errors on every route and way of
serving; so the models stay vLLM's and their documentation is extended.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI

from vllm_calidrop.settings.request import RequestSettings

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses")
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


def document_fields(app: FastAPI) -> None:
    """From now on the application's OpenAPI document has the fields."""
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


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return schema
    documentation = ("title", "description", "default")
    nullable: dict[str, Any] = {name: schema[name] for name in documentation if name in schema}
    rest = {name: value for name, value in schema.items() if name not in documentation}
    return nullable | {"anyOf": [rest, {"type": "null"}]}
