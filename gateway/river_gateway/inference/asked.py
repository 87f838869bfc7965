"""What a client asks for in a completion: the few fields that matter here, and the body that the engine gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from river_gateway.codec import storable
from river_gateway.errors import InvalidFieldError, InvalidTypeError, MalformedBodyError
from river_gateway.inference.sse import UsageWishes
from river_gateway.limits import (
    ANSWER_TOKENS_GUESSED,
    CHOICES_MAX,
    ROUTING_PREFIX_BYTES,
    USER_MAX_CHARS,
)
from river_gateway.tenancy.quotas import tokens_guessed

if TYPE_CHECKING:
    from collections.abc import Mapping

Body = TypeVar("Body")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Asked(msgspec.Struct, frozen=True):
    """Of a completion's body; everything else is the engine's affair.

    `prompt` is only looked at to tell one prompt from several.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    user: Annotated[str, msgspec.Meta(max_length=USER_MAX_CHARS)] | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def wishes(self) -> UsageWishes:
        """Which usage the client is to see in a stream."""
        options = self.stream_options or StreamOptions()
        return UsageWishes(
            final=bool(options.include_usage),
            continuous=bool(options.include_usage and options.continuous_usage_stats),
        )

    @property
    def choices_per_prompt(self) -> int:
        """How many answers there are to each prompt."""
        return max(self.n or 1, 1)

    @property
    def single(self) -> bool:
        """Whether there will be one choice only: one answer to one prompt."""
        return self.choices_per_prompt == 1 and bytes(memoryview(self.prompt)[:1]) != b"["

    def tokens_guessed(self, body_bytes: int) -> int:
        """About how many tokens it will use, for limits: of a prompt of that size, and of what may be answered."""
        answer = self.max_completion_tokens or self.max_tokens or ANSWER_TOKENS_GUESSED
        return tokens_guessed(body_bytes) + self.choices_per_prompt * max(answer, 1)


_PROMPT_FIELDS = ("system", "instructions", "messages", "prompt", "input")
"""What engines read, in their order, by any of its names."""

_asked_decoder = msgspec.json.Decoder(Asked)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def prompt_beginning(fields: Mapping[str, msgspec.Raw]) -> bytes:
    """What requests whose prompts begin alike have in common, whatever else they ask for."""
    beginning = b""
    for name in _PROMPT_FIELDS:
        value = fields.get(name)
        if value is not None:
            beginning += memoryview(value)[: ROUTING_PREFIX_BYTES - len(beginning)]
    return beginning


def read_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a body, each as it came.

    Raises:
        MalformedBodyError: it is no JSON object.
    """
    try:
        return _fields_decoder.decode(body)
    except msgspec.ValidationError:
        raise MalformedBodyError("the body is not a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBodyError(f"the body is not valid JSON: {error}") from None


def read_asked(body: bytes) -> Asked:
    """What a completion's body asks for.

    Raises:
        InvalidFieldError: a field has the wrong type, or `user` cannot be written down.
    """
    return decode(_asked_decoder, body)


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """A body that is a JSON object, by the decoder of what matters of it.

    Raises:
        InvalidFieldError: a field has the wrong type, or `user` cannot be written down.
    """
    try:
        asked = decoder.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or ("model" if "`model`" in message else None)
        if param == "model" and not path:
            message = "you must provide a model parameter"
        elif message.startswith("Expected `") and " of length " not in message:
            message = f"Invalid type for '{param}': {message[0].lower()}{message[1:]}."
            raise InvalidTypeError(message, param=param) from None
        raise InvalidFieldError(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBodyError(f"the body is not valid JSON: {error}") from None
    user = getattr(asked, "user", None)
    if user is not None:
        storable(user, "user")
    return asked


def engine_body(fields: Mapping[str, msgspec.Raw], asked: Asked, base_model: str) -> bytes:
    """The body for the engine: the base model's name, and in a stream usage in every chunk."""
    for_engine: dict[str, Any] = {**fields, "model": base_model}
    if asked.stream:
        options = msgspec.json.decode(
            fields.get("stream_options", b"null"), type=dict[str, Any] | None
        )
        for_engine["stream_options"] = {
            **(options or {}),
            "include_usage": True,
            "continuous_usage_stats": True,
        }
    return msgspec.json.encode(for_engine)
