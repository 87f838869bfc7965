"""What the inference routes differ in: how a request is read, and what is counted and shown of its answer.

`Completions` does the rest, the same for all of them. Here is OpenAI's chat and text completions; the others are in
`responses_api.py` and `messages_api.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from river_gateway.errors import openai_body
from river_gateway.inference.asked import engine_body, read_asked
from river_gateway.inference.metering import Chunk, Usage
from river_gateway.inference.sse import UsageFilter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_billing.events import UsageKind
    from river_gateway.errors import GatewayError
    from river_gateway.inference.asked import Asked
    from river_gateway.inference.fields import Fields

Header = tuple[bytes, bytes]


class StreamReader(Protocol):
    """Counts what a stream's events say was used, and makes of them what the client is to see.

    `done` is set once the stream has said its last word.
    """

    @property
    def done(self) -> bool: ...
    def show(self, events: bytes) -> bytes:
        """Whole events as the client is to see them; empty when none are for it."""
        ...

    def quantities(self) -> dict[UsageKind, int]:
        """Tokens by kind so far."""
        ...


class Dialect(Protocol):
    """One route; `path` is the gateway's and the engine's. `keep_alive` is an event that every client passes over."""

    @property
    def path(self) -> str: ...
    @property
    def keep_alive(self) -> bytes: ...
    def read(self, body: bytes, fields: Mapping[str, msgspec.Raw]) -> Asked:
        """What the client asks for.

        Raises:
            InvalidFieldError: a field is wrong, unknown, or asks for something that is not offered.
        """
        ...

    def engine_body(self, fields: dict[str, msgspec.Raw], asked: Asked, base_model: str) -> bytes:
        """The body for the engine."""
        ...

    def usage_of(self, answer: bytes) -> Usage | None:
        """What a whole answer says was used."""
        ...

    def stream_reader(self, asked: Asked) -> StreamReader:
        """A reader for one stream."""
        ...

    def headers(self, request_id: str) -> tuple[Header, ...]:
        """Of every answer."""
        ...

    def error_event(self, error: GatewayError, request_id: str) -> bytes:
        """Ends a stream that has begun."""
        ...


_chunk_decoder = msgspec.json.Decoder(Chunk)


class OpenAICompletions:
    """`/v1/chat/completions` or `/v1/completions`."""

    keep_alive = b": keep-alive\n\n"

    def __init__(self, path: str, fields: Fields) -> None:
        self.path = path
        self._fields = fields

    def read(self, body: bytes, fields: Mapping[str, msgspec.Raw]) -> Asked:
        self._fields.check(fields)
        return read_asked(body)

    def engine_body(self, fields: dict[str, msgspec.Raw], asked: Asked, base_model: str) -> bytes:
        return engine_body(fields, asked, base_model)

    def usage_of(self, answer: bytes) -> Usage | None:
        return _chunk_decoder.decode(answer).usage

    def stream_reader(self, asked: Asked) -> UsageFilter:
        return UsageFilter(
            asked.wishes, choices_per_prompt=asked.choices_per_prompt, single=asked.single
        )

    def headers(self, request_id: str) -> tuple[Header, ...]:  # noqa: ARG002 - the envelope has said it
        return OPENAI_HEADERS

    def error_event(self, error: GatewayError, request_id: str) -> bytes:  # noqa: ARG002 - in the headers
        return b"data: " + msgspec.json.encode(openai_body(error)) + b"\n\n"


OPENAI_HEADERS: tuple[Header, ...] = ((b"openai-version", b"2020-10-01"),)


def with_model(fields: dict[str, msgspec.Raw], base_model: str) -> bytes:
    """The body with the base model's name in it."""
    return msgspec.json.encode(fields | {"model": base_model})


def event(name: str, data: Any) -> bytes:
    """An event with a name, as the newer APIs have them."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
