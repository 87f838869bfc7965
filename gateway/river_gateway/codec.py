"""Bodies of `/river/v1` in both encodings: msgpack or JSON by Content-Type in, by Accept out.

Handlers declare `data: SomeStruct`. `WireRequest` decodes straight into that struct, in one strict pass, where Litestar
would build plain objects first and convert them leniently.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response

from river_gateway.errors import InvalidFieldError, MalformedBodyError

MSGPACK = "application/msgpack"
JSON = "application/json"

StructType = TypeVar("StructType")

_ERROR_PATH = re.compile(r"^(?P<message>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"missing required field `(?P<name>[^`]+)`")


class WireRequest(Request[Any, Any, Any]):
    """A request whose `data` is decoded by its Content-Type."""

    async def json(self) -> Any:
        """The body as the handler's own struct.

        Raises:
            MalformedBodyError: it is not in the encoding it claims.
            InvalidFieldError: it does not fit the struct; names the field by its path.
        """
        field = self.route_handler.parsed_fn_signature.parameters.get("data")
        assert field is not None
        content_type = self.headers.get("content-type", JSON)
        return decode_body(await self.body(), field.annotation, content_type)


def decode_body(body: bytes, kind: type[StructType], content_type: str) -> StructType:
    """`body` as a `kind`; raises as `WireRequest.json` does."""
    decode = msgspec.msgpack.decode if is_msgpack(content_type) else msgspec.json.decode
    try:
        return decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        encoding = "msgpack" if is_msgpack(content_type) else "JSON"
        raise MalformedBodyError(f"the body is not valid {encoding}: {error}") from None


def is_msgpack(media_type: str) -> bool:
    """Whether a Content-Type or Accept header means msgpack."""
    return "msgpack" in media_type


def reply(
    request: Request[Any, Any, Any], value: StructType, *, status: int = HTTPStatus.OK
) -> Response[StructType]:
    """`value` in the encoding that the client accepts."""
    if is_msgpack(request.headers.get("accept", "")):
        return Response(msgspec.msgpack.encode(value), media_type=MSGPACK, status_code=status)  # type: ignore[return-value]
    return Response(msgspec.json.encode(value), media_type=JSON, status_code=status)  # type: ignore[return-value]


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
