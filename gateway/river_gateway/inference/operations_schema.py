"""What `/schema` says of the bodies of the inference routes, which no struct decodes: their fields by name."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.spec import OpenAPIMediaType, Operation, Reference, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType

from river_gateway.inference.fields import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    COUNT_TOKENS,
    MESSAGES,
    RESPONSES,
    Fields,
)

_STRING = Schema(type=OpenAPIType.STRING)
_BOOLEAN = Schema(type=OpenAPIType.BOOLEAN)
_COUNT = Schema(type=OpenAPIType.INTEGER, minimum=1)
_NUMBER = Schema(type=OpenAPIType.NUMBER)
_MESSAGE = Schema(
    type=OpenAPIType.OBJECT,
    properties={"role": Schema(enum=["user", "assistant"]), "content": _STRING},
    required=["role", "content"],
)
_MESSAGES = Schema(type=OpenAPIType.ARRAY, items=_MESSAGE, min_items=1)
_TYPES = {
    "model": _STRING,
    "user": _STRING,
    "instructions": _STRING,
    "stream": _BOOLEAN,
    "store": _BOOLEAN,
    "messages": _MESSAGES,
    "n": Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=128),
    "seed": Schema(type=OpenAPIType.INTEGER),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
}


def _body(fields: Fields, *required: str) -> RequestBody:
    properties: dict[str, Reference | Schema] = {
        name: _TYPES.get(name, Schema()) for name in sorted(fields.passed)
    }
    schema = Schema(
        type=OpenAPIType.OBJECT,
        properties=properties,
        required=list(required),
        additional_properties=False,
    )
    return RequestBody(content={"application/json": OpenAPIMediaType(schema)}, required=True)


@dataclass
class ChatCompletionsOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(CHAT_COMPLETIONS, "model", "messages")


@dataclass
class CompletionsOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(COMPLETIONS, "model", "prompt")


@dataclass
class ResponsesOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(RESPONSES, "model", "input")


@dataclass
class MessagesOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(MESSAGES, "model", "messages", "max_tokens")


@dataclass
class CountTokensOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(COUNT_TOKENS, "model", "messages")
