"""Bodies of `/river/v1` in both encodings: msgpack or JSON by Content-Type in, by Accept out.

Handlers declare `data: SomeStruct`. `WireRequest` decodes straight into that struct, in one strict pass, where Litestar
would build plain objects first and convert them leniently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar, cast

import msgspec
from litestar import Request, Response

from river_gateway.errors import InvalidFieldError, MalformedBodyError
from river_gateway.limits import IDEMPOTENCY_KEY_MAX_CHARS

MSGPACK = "application/msgpack"
JSON = "application/json"
IDEMPOTENCY_HEADER = "idempotency-key"
NUL = "\0"

StructType = TypeVar("StructType")

_ERROR_PATH = re.compile(r"^(?P<message>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_PREFERRED_WAIT = re.compile(r"(?:^|,)\s*wait=(?P<seconds>[0-9]{1,4})\s*(?:,|;|$)")
_MISSING_FIELD = re.compile(r"missing required field `(?P<name>[^`]+)`")


class WireRequest(Request[Any, Any, Any]):
    """A request whose `data` is decoded by its Content-Type."""

    async def json(self) -> Any:
        """The body as the handler's own struct.

        Raises:
            MalformedBodyError: it is not in the encoding it claims.
            InvalidFieldError: it does not fit the struct, or has a text that cannot be stored; names the field by path.
        """
        field = self.route_handler.parsed_fn_signature.parameters.get("data")
        assert field is not None
        content_type = self.headers.get("content-type", JSON)
        return decode_body(await self.body(), field.annotation, content_type)


def idempotency_key(
    request: Request[Any, Any, Any], header: str = IDEMPOTENCY_HEADER
) -> str | None:
    """What a client marks a request and its repetitions with, in a `header` that dialects name differently.

    Raises:
        InvalidFieldError: it is too long.
    """
    key = request.headers.get(header)
    if key is not None and len(key) > IDEMPOTENCY_KEY_MAX_CHARS:
        raise InvalidFieldError(
            f"{header}: {len(key)} characters, at most {IDEMPOTENCY_KEY_MAX_CHARS}", param=header
        )
    return key or None


def decode_body(body: bytes, kind: type[StructType], content_type: str) -> StructType:
    """`body` as a `kind`; raises as `WireRequest.json` does."""
    decode = msgspec.msgpack.decode if is_msgpack(content_type) else msgspec.json.decode
    try:
        decoded = decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        encoding = "msgpack" if is_msgpack(content_type) else "JSON"
        raise MalformedBodyError(f"the body is not valid {encoding}: {error}") from None
    _check_texts(decoded, "")
    return decoded


def storable(text: str, field: str) -> str:
    """A text that Postgres can hold, which any is but one with a NUL.

    Raises:
        InvalidFieldError: it has one.
    """
    if NUL in text:
        message = f"{field}: character {text.index(NUL)} is NUL (U+0000), which cannot be stored"
        raise InvalidFieldError(message, param=field)
    return text


def _check_texts(value: Any, where: str) -> None:
    """Checks all texts of a struct but for those in lists: prompts and data, which are not stored."""
    match value:
        case str():
            storable(value, where)
        case dict():
            for key, item in cast("dict[str, Any]", value).items():
                storable(key, where)
                _check_texts(item, f"{where}.{key}")
        case msgspec.Struct():
            for name in value.__struct_fields__:
                # An operation's fields are named as by `_invalid_field`.
                place = f"{where}.{name}" if where not in ("", "operation") else name
                _check_texts(getattr(value, name), place)
        case _:
            pass


def is_msgpack(media_type: str) -> bool:
    """Whether a Content-Type or Accept header means msgpack."""
    return "msgpack" in media_type


def reply(
    request: Request[Any, Any, Any],
    value: StructType,
    *,
    status: int = HTTPStatus.OK,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> Response[StructType]:
    """`value` in the encoding that the client accepts."""
    encode, media_type = encoder_for(request)
    return Response(  # type: ignore[return-value]
        encode(value),
        media_type=media_type,
        status_code=status,
        headers={name.decode(): text.decode() for name, text in headers},
    )


def preferred_wait_s(request: Request[Any, Any, Any], *, at_most_s: float) -> float:
    """How long a client would rather wait for a result than be told that there will be one: RFC 7240's `wait`."""
    match = _PREFERRED_WAIT.search(request.headers.get("prefer", ""))
    return 0.0 if match is None else min(float(match["seconds"]), at_most_s)


def encoder_for(request: Request[Any, Any, Any]) -> tuple[Callable[[Any], bytes], str]:
    """How to encode what the client accepts, and its media type."""
    if is_msgpack(request.headers.get("accept", "")):
        return msgspec.msgpack.encode, MSGPACK
    return msgspec.json.encode, JSON


def _invalid_field(error: str) -> InvalidFieldError:
    match = _ERROR_PATH.match(error)
    assert match is not None
    message = match["message"]
    # The path of an operation's field is told as clients write it: data[0].weights, not operation.data[0].weights.
    param = (match["path"] or "").lstrip(".").removeprefix("operation.")
    missing = _MISSING_FIELD.search(message)
    if missing is not None:
        param = f"{param}.{missing['name']}" if param and param != "operation" else missing["name"]
    return InvalidFieldError(f"{param}: {message}" if param else message, param=param or None)
