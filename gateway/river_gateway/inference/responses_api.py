"""OpenAI's Responses, stateless: each request brings its whole conversation, and nothing is kept of the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from river_gateway.errors import InvalidFieldError, UnsupportedFieldError, openai_body
from river_gateway.inference.asked import Asked, decode
from river_gateway.inference.dialects import OPENAI_HEADERS, event, with_model
from river_gateway.inference.fields import RESPONSES
from river_gateway.inference.metering import PromptDetails, Usage
from river_gateway.inference.typed_streams import TypedEvents, unchanged
from river_gateway.limits import USER_MAX_CHARS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_gateway.errors import GatewayError
    from river_gateway.inference.dialects import Header

PATH = "/v1/responses"
TOOL_TYPES = ("function",)


class _Tool(msgspec.Struct, frozen=True):
    type: str


class _ResponsesAsked(msgspec.Struct, frozen=True):
    model: str
    stream: bool | None = None
    user: Annotated[str, msgspec.Meta(max_length=USER_MAX_CHARS)] | None = None
    max_output_tokens: int | None = None
    tools: list[_Tool] | None = None


class _ResponsesUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    input_tokens_details: PromptDetails | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _ResponsesUsage | None = None


class _End(msgspec.Struct, frozen=True):
    status: str


class _LastEvent(msgspec.Struct, frozen=True):
    response: _End


_asked_decoder = msgspec.json.Decoder(_ResponsesAsked)
_answer_decoder = msgspec.json.Decoder(_Answer)
_last_decoder = msgspec.json.Decoder(_LastEvent)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])

_COMPLETED = b"event: response.completed"
_DATA = b"\ndata: "


class Responses:
    """`/v1/responses`."""

    path = PATH
    keep_alive = b": keep-alive\n\n"

    def read(self, body: bytes, fields: Mapping[str, msgspec.Raw]) -> Asked:
        RESPONSES.check(fields)
        if "input" not in fields:
            raise InvalidFieldError("Missing required parameter: 'input'.", param="input")
        asked = decode(_asked_decoder, body)
        for index, tool in enumerate(asked.tools or ()):
            if tool.type not in TOOL_TYPES:
                raise UnsupportedFieldError(
                    f"tools of type {tool.type!r} are not offered; only {', '.join(TOOL_TYPES)} is",
                    param=f"tools[{index}].type",
                )
        return Asked(
            model=asked.model,
            stream=asked.stream,
            user=asked.user,
            max_tokens=asked.max_output_tokens,
        )

    def engine_body(self, fields: dict[str, msgspec.Raw], asked: Asked, base_model: str) -> bytes:  # noqa: ARG002 - the stream has its usage anyway
        return with_model(fields, base_model)

    def usage_of(self, answer: bytes) -> Usage | None:
        usage = _answer_decoder.decode(answer).usage
        if usage is None:
            return None
        return Usage(
            prompt_tokens=usage.input_tokens,
            completion_tokens=usage.output_tokens,
            prompt_tokens_details=usage.input_tokens_details,
        )

    def stream_reader(self, asked: Asked) -> TypedEvents:  # noqa: ARG002 - one reader for all
        return TypedEvents({_COMPLETED: _last_event, b"event: response.failed": unchanged})

    def headers(self, request_id: str) -> tuple[Header, ...]:  # noqa: ARG002 - the envelope has said it
        return OPENAI_HEADERS

    def error_event(self, error: GatewayError, request_id: str) -> bytes:  # noqa: ARG002 - in the headers
        told = openai_body(error)["error"]
        return event(
            "error",
            {
                "type": "error",
                "code": told["code"] or told["type"],
                "message": told["message"],
                "param": told["param"],
                "sequence_number": 0,
            },
        )


def _last_event(completed: bytes) -> bytes:
    """The event that ends a response: of one that was cut off OpenAI says so by the name, vLLM by the status only."""
    data = completed[len(_COMPLETED) + len(_DATA) :]
    status = _last_decoder.decode(data).response.status
    if status == "completed":
        return completed
    name = f"response.{status}"
    fields = _fields_decoder.decode(data)
    fields["type"] = msgspec.Raw(msgspec.json.encode(name))
    return event(name, fields).removesuffix(b"\n\n")
