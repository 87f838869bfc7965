"""What `/schema` says beyond what Litestar finds out: errors in the shape of each dialect, and both encodings."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from litestar.openapi.plugins import JsonRenderPlugin

from river_client.wire import API_PREFIX
from river_gateway.codec import JSON, MSGPACK
from river_gateway.errors import is_anthropic, is_openai

if TYPE_CHECKING:
    from litestar import Request

Json = dict[str, Any]

ERRORS: dict[int, str] = {
    400: "The body is no JSON or msgpack, or, on `/v1`, a field is wrong.",
    401: "No key, or one that is not known.",
    402: "Out of credit.",
    403: "The key may not do this.",
    404: "Unknown, or another tenant's.",
    409: "It conflicts with what is there.",
    410: "It was there, and is kept no longer.",
    413: "The body is too large.",
    422: "A field is wrong: `param` names it.",
    429: "A limit is reached, or all engines are full: try again after `retry-after`.",
    500: "A fault of the server.",
    501: "Not offered here.",
    503: "Not available at the moment: try again after `retry-after`.",
    507: "The storage is full.",
}
"""Every status that is an error, as `errors.py` has them; whoever would see 499 has left."""

_TEXT: Json = {"type": "string"}
_TEXT_OR_NULL: Json = {"type": ["string", "null"]}

_SCHEMAS: dict[str, Json] = {
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": _TEXT_OR_NULL,
                    "code": _TEXT_OR_NULL,
                },
                "additionalProperties": False,
            }
        },
        "additionalProperties": False,
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
                "additionalProperties": False,
            },
            "request_id": _TEXT,
        },
        "additionalProperties": False,
    },
    "RiverError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["type", "message", "request_id"],
                "properties": {
                    "type": _TEXT,
                    "message": _TEXT,
                    "param": _TEXT_OR_NULL,
                    "request_id": _TEXT_OR_NULL,
                },
                "additionalProperties": False,
            }
        },
        "additionalProperties": False,
    },
}


class DescribedPlugin(JsonRenderPlugin):
    """The document as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: Json) -> bytes:
        """Called by Litestar with what it has found out."""
        del request  # It is the same for all.
        return msgspec.json.encode(described(openapi_schema))


def described(document: Json) -> Json:
    """The document, complete."""
    components: Json = document.get("components", {})
    return document | {
        "paths": {path: _described_path(path, item) for path, item in document["paths"].items()},
        "components": components | {"schemas": components.get("schemas", {}) | _SCHEMAS},
    }


def _described_path(path: str, item: Json) -> Json:
    operations: Json = {}
    for method, operation in item.items():
        answers: Json = operation["responses"]
        formats = _formats(operation.get("parameters") or [])
        operations[method] = operation | {"responses": _responses(path, answers, formats)}
    return operations


def _formats(parameters: list[Json]) -> Json:
    """What an operation answers with when `format` asks for it: text, by its media type."""
    offered: list[list[str | None]] = [
        one["schema"].get("enum") or [] for one in parameters if one["name"] == "format"
    ]
    return {f"text/{name}": {"schema": _TEXT} for names in offered for name in names if name}


def _responses(path: str, found: Json, formats: Json) -> Json:
    """An operation's answers. Litestar's own 400 is none of ours: errors have another shape here."""
    answers = {
        status: _with_content(_in_both_encodings(path, answer), formats)
        for status, answer in found.items()
        if int(status) < HTTPStatus.BAD_REQUEST
    }
    return answers | _errors(path)


def _with_content(answer: Json, formats: Json) -> Json:
    content: Json = answer.get("content") or {}
    return answer | {"content": content | formats} if content else answer


def _in_both_encodings(path: str, answer: Json) -> Json:
    content: Json = answer.get("content") or {}
    if not path.startswith(API_PREFIX) or JSON not in content:
        return answer
    return answer | {"content": content | {MSGPACK: content[JSON]}}


def _errors(path: str) -> Json:
    name = "RiverError"
    if is_openai(path):
        name = "AnthropicError" if is_anthropic(path) else "OpenAIError"
    schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {
        str(status): _in_both_encodings(
            path, {"description": description, "content": {JSON: schema}}
        )
        for status, description in ERRORS.items()
    }
