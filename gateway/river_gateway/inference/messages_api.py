"""Anthropic's Messages, for its clients: engines speak it themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from river_gateway.errors import InvalidFieldError, UnsupportedFieldError, anthropic_body
from river_gateway.inference.asked import Asked, decode
from river_gateway.inference.dialects import event, with_model
from river_gateway.inference.fields import COUNT_TOKENS, MESSAGES
from river_gateway.inference.metering import PromptDetails, Usage
from river_gateway.inference.typed_streams import TypedEvents, unchanged
from river_gateway.limits import USER_MAX_CHARS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_gateway.errors import GatewayError
    from river_gateway.inference.dialects import Header
    from river_gateway.inference.fields import Fields

MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"


class _Metadata(msgspec.Struct, frozen=True):
    user_id: Annotated[str, msgspec.Meta(max_length=USER_MAX_CHARS)] | None = None


class _Tool(msgspec.Struct, frozen=True):
    type: str | None = None


class _MessagesAsked(msgspec.Struct, frozen=True):
    model: str
    stream: bool | None = None
    max_tokens: int | None = None
    metadata: _Metadata | None = None
    tools: list[_Tool] | None = None


class _MessagesUsage(msgspec.Struct, frozen=True):
    """Unlike OpenAI's, `input_tokens` leaves out what was read from the cache or written to it."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _MessagesUsage | None = None


_asked_decoder = msgspec.json.Decoder(_MessagesAsked)
_answer_decoder = msgspec.json.Decoder(_Answer)


class Messages:
    """`/v1/messages`, and `/v1/messages/count_tokens`, which uses nothing."""

    keep_alive = event("ping", {"type": "ping"})

    def __init__(self, path: str, fields: Fields, required: tuple[str, ...]) -> None:
        self.path = path
        self._fields = fields
        self._required = required

    def read(self, body: bytes, fields: Mapping[str, msgspec.Raw]) -> Asked:
        self._fields.check(fields)
        for name in self._required:
            if name not in fields:
                raise InvalidFieldError(f"{name}: Field required", param=name)
        asked = decode(_asked_decoder, body)
        for index, tool in enumerate(asked.tools or ()):
            if tool.type not in (None, "custom"):
                raise UnsupportedFieldError(
                    f"tools.{index}.type: tools of type {tool.type!r} are not offered; only custom ones are"
                )
        return Asked(
            model=asked.model,
            stream=asked.stream,
            max_tokens=asked.max_tokens,
            user=asked.metadata.user_id if asked.metadata else None,
        )

    def engine_body(self, fields: dict[str, msgspec.Raw], asked: Asked, base_model: str) -> bytes:  # noqa: ARG002 - the stream has its usage anyway
        return with_model(fields, base_model)

    def usage_of(self, answer: bytes) -> Usage | None:
        usage = _answer_decoder.decode(answer).usage
        if usage is None:
            return None
        cached = usage.cache_read_input_tokens or 0
        return Usage(
            prompt_tokens=usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0),
            completion_tokens=usage.output_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )

    def stream_reader(self, asked: Asked) -> TypedEvents:  # noqa: ARG002 - one reader for all
        return TypedEvents({b"event: message_stop": unchanged, b"event: error": unchanged})

    def headers(self, request_id: str) -> tuple[Header, ...]:
        return ((b"request-id", request_id.encode()),)

    def error_event(self, error: GatewayError, request_id: str) -> bytes:
        return event("error", anthropic_body(error, request_id))


MESSAGES_DIALECT = Messages(MESSAGES_PATH, MESSAGES, ("model", "messages", "max_tokens"))
COUNT_TOKENS_DIALECT = Messages(COUNT_TOKENS_PATH, COUNT_TOKENS, ("model", "messages"))
