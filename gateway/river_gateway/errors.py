"""The gateway's one tree of errors, and its mapping to the wire in both shapes.

    GatewayError
    ├── MalformedBodyError        400  the body is not JSON or msgpack at all
    ├── UnauthenticatedError      401
    ├── OutOfCreditError          402  before any work is done; also where a monthly budget is used up
    ├── PermissionDeniedError     403
    ├── NotFoundError             404  unknown, or another tenant's: never told apart
    │   └── UnknownModelError     404
    ├── ClientGoneError           499  nobody is left to read the answer
    ├── ConflictError             409
    │   └── AheadError            409  an operation is too far ahead of those done; later it may be not
    ├── GoneError                 410  it was there, and is kept no longer
    ├── TooLargeError             413
    ├── InvalidFieldError         422  names field, index and limit; 400 on `/v1`, as the `openai` package expects
    │   ├── InvalidTypeError      422  a value of another type
    │   ├── UnknownFieldError     422  there is no such field
    │   └── UnsupportedFieldError 422  there is, but what it asks for is not offered
    ├── RateLimitedError          429
    ├── EngineRefusedError        4xx  the engine's own refusal, passed on
    ├── NotSupportedError         501
    ├── UnavailableError          503  with Retry-After
    │   ├── StillLoadingError     503  an engine is loading the model's weights for longer than a request waits
    │   └── UnloadableError       503  an engine cannot load the model's weights
    │       └── PrunedError       503  because they are gone, maybe for newer ones
    └── StorageFullError          507

`/v1/messages` speaks Anthropic's shape, the rest of `/v1` OpenAI's, everything else `river_client.wire.ErrorEnvelope`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import nats.errors
import nats.js.errors
from litestar import Request, Response
from litestar.exceptions import HTTPException

from river_client import wire
from river_gateway.context import context_of
from river_gateway.database import POSTGRES_AWAY, UNSTORABLE
from river_gateway.limits import RETRY_AFTER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from river_gateway.context import RequestContext

logger = logging.getLogger("river.gateway")

_JETSTREAM_STORAGE_FULL = frozenset({10023, 10047, 10077})


class GatewayError(Exception):
    """Root: `status` and `type` are the class's, `param` names the field."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    type: str = "internal_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class MalformedBodyError(GatewayError):
    status = HTTPStatus.BAD_REQUEST
    type = "invalid_request"


class UnauthenticatedError(GatewayError):
    status = HTTPStatus.UNAUTHORIZED
    type = "authentication"
    code = "invalid_api_key"


class OutOfCreditError(GatewayError):
    status = HTTPStatus.PAYMENT_REQUIRED
    type = "out_of_credit"
    code = "insufficient_quota"


class PermissionDeniedError(GatewayError):
    status = HTTPStatus.FORBIDDEN
    type = "permission_denied"
    code = "insufficient_scope"


class NotFoundError(GatewayError):
    status = HTTPStatus.NOT_FOUND
    type = "not_found"


class UnknownModelError(NotFoundError):
    code = "model_not_found"


class ClientGoneError(GatewayError):
    status = 499
    type = "client_gone"


class ConflictError(GatewayError):
    status = HTTPStatus.CONFLICT
    type = "conflict"


class AheadError(ConflictError):
    pass


class GoneError(GatewayError):
    status = HTTPStatus.GONE
    type = "gone"


class TooLargeError(GatewayError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "too_large"


class InvalidFieldError(GatewayError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    type = "invalid_request"


class InvalidTypeError(InvalidFieldError):
    code = "invalid_type"


class UnknownFieldError(InvalidFieldError):
    def __init__(self, name: str) -> None:
        # OpenAI's words, which clients look for; it names no param.
        super().__init__(f"Unrecognized request argument supplied: {name}")


class UnsupportedFieldError(InvalidFieldError):
    code = "unsupported_parameter"


class RateLimitedError(GatewayError):
    """`openai_type` says what OpenAI counts it under, `requests` or `tokens`; `headers` go with the answer."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "rate_limited"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float,
        openai_type: Literal["requests", "tokens"] = "requests",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.openai_type = openai_type
        self.headers = headers


class EngineRefusedError(GatewayError):
    """`status` is the engine's, between 400 and 499."""

    type = "invalid_request"

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        assert 400 <= status < 500  # noqa: PLR2004 - the range of client errors
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class NotSupportedError(GatewayError):
    status = HTTPStatus.NOT_IMPLEMENTED
    type = "not_supported"


class UnavailableError(GatewayError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class StillLoadingError(UnavailableError):
    code = "model_loading"


class UnloadableError(UnavailableError):
    """Where the weights lie and what is wrong with them is for the log: it is nothing that a tenant could mend."""

    def __init__(self) -> None:
        super().__init__("the model's weights cannot be loaded now; try again")


class PrunedError(UnloadableError):
    pass


class StorageFullError(GatewayError):
    status = HTTPStatus.INSUFFICIENT_STORAGE
    type = "storage_full"


# ---- To the wire -----------------------------------------------------------------------------------------------------

_OPENAI_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.PAYMENT_REQUIRED: "insufficient_quota",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "requests",
}


def openai_body(error: GatewayError) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    type_ = _OPENAI_TYPES.get(error.status)
    if isinstance(error, RateLimitedError):
        type_ = error.openai_type
    if type_ is None:
        type_ = (
            "server_error"
            if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
            else "invalid_request_error"
        )
    return {
        "error": {
            "message": error.message,
            "type": type_,
            "param": error.param,
            "code": error.code,
        }
    }


_ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.PAYMENT_REQUIRED: "billing_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def anthropic_body(error: GatewayError, request_id: str) -> dict[str, Any]:
    """Anthropic's shape of an error."""
    failed = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    type_ = _ANTHROPIC_TYPES.get(
        HTTPStatus(error.status) if error.status in _ANTHROPIC_TYPES else HTTPStatus.OK,
        "api_error" if failed else "invalid_request_error",
    )
    return {
        "type": "error",
        "error": {"type": type_, "message": error.message},
        "request_id": request_id,
    }


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error on the wire."""

    status: int
    media_type: str
    headers: dict[str, str]
    body: bytes


def error_answer(
    error: GatewayError, *, path: str, accept: str = "", request_id: str
) -> ErrorAnswer:
    """The answer to a request that failed, in the shape of the dialect that `path` speaks."""
    status = int(error.status)
    media_type = "application/json"
    headers: dict[str, str] = {}
    if is_openai(path):
        if isinstance(error, InvalidFieldError):
            status = HTTPStatus.BAD_REQUEST
        if is_anthropic(path):
            body = msgspec.json.encode(anthropic_body(error, request_id))
            headers["request-id"] = request_id
        else:
            body = msgspec.json.encode(openai_body(error))
    else:
        envelope = wire.ErrorEnvelope(
            error=wire.ErrorBody(
                type=error.type, message=error.message, param=error.param, request_id=request_id
            )
        )
        if "msgpack" in accept:
            media_type = "application/msgpack"
            body = msgspec.msgpack.encode(envelope)
        else:
            body = msgspec.json.encode(envelope)
    headers |= headers_of(error, scheme="Bearer")
    return ErrorAnswer(status, media_type, headers, body)


def headers_of(error: GatewayError, *, scheme: str) -> dict[str, str]:
    """What tells a client when to try again, what is left of its limits, and by which `scheme` to show a key."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        # Whole seconds are what the standard knows; OpenAI's clients look for the milliseconds first.
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, RateLimitedError):
        headers |= {name.decode(): value.decode() for name, value in error.headers}
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = scheme
    return headers


def is_openai(path: str) -> bool:
    """Whether a path speaks OpenAI's dialect or, among those paths, Anthropic's."""
    return path == "/v1" or path.startswith("/v1/")


def is_anthropic(path: str) -> bool:
    """Whether a path speaks Anthropic's dialect."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


# ---- From elsewhere --------------------------------------------------------------------------------------------------


def from_jetstream(error: nats.errors.Error) -> GatewayError:
    """What a failure of NATS means to a client."""
    if (
        isinstance(error, nats.js.errors.APIError)
        and getattr(error, "err_code", None) in _JETSTREAM_STORAGE_FULL
    ):
        return StorageFullError("the message store is full; try again when space has been made")
    return UnavailableError("the message bus is not reachable; try again")


def _from_http_exception(error: HTTPException) -> GatewayError:
    status = error.status_code
    detail = error.detail or HTTPStatus(status).phrase
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLargeError("the body is larger than this server takes")
    if status == HTTPStatus.NOT_FOUND:
        return NotFoundError("no such route")
    if status == HTTPStatus.BAD_REQUEST:
        return InvalidFieldError(_validation_detail(error), param=_validation_param(error))
    if HTTPStatus.BAD_REQUEST < status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return EngineRefusedError(status, detail)
    return GatewayError("internal error")


def _validation_extra(error: HTTPException) -> Mapping[str, Any]:
    extra = error.extra
    if isinstance(extra, list) and extra and isinstance(extra[0], dict):
        return cast("dict[str, Any]", extra[0])
    return {}


def _validation_detail(error: HTTPException) -> str:
    return str(_validation_extra(error).get("message") or error.detail)


def _validation_param(error: HTTPException) -> str | None:
    key = _validation_extra(error).get("key")
    return str(key) if key else None


def as_gateway_error(error: Exception, context: RequestContext) -> GatewayError:
    """What any exception means to a client; what only we can mend is logged, and noted in the context."""
    found = _meaning_of(error, context)
    if int(found.status) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        ours = found is error or isinstance(error, HTTPException)
        context.problem = found.message if ours else f"{found.message} ({type(error).__name__})"
    return found


def _meaning_of(error: Exception, context: RequestContext) -> GatewayError:
    match error:
        case GatewayError():
            return error
        case HTTPException():
            return _from_http_exception(error)
        case nats.errors.Error():
            logger.warning("NATS failed a request: %r", error, extra=context.log_ids())
            return from_jetstream(error)
        case _ if isinstance(error, POSTGRES_AWAY):
            logger.warning("Postgres failed a request: %r", error, extra=context.log_ids())
            return UnavailableError("the catalog is not reachable; try again")
        case _ if isinstance(error, UNSTORABLE):
            return InvalidFieldError("a name has a character that cannot be stored")
        case _:
            logger.error("a request failed", exc_info=error, extra=context.log_ids())
            return GatewayError("internal error")


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    context = context_of(request.scope)
    answer = error_answer(
        as_gateway_error(error, context),
        path=request.scope["path"],
        accept=request.headers.get("accept", ""),
        request_id=context.request_id,
    )
    return Response(
        answer.body,
        status_code=answer.status,
        media_type=answer.media_type,
        headers=answer.headers,
    )


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Any, Any], Response[bytes]]] = {
    # Litestar asks for the handler of HTTPException by its status, before it asks for that of Exception.
    HTTPException: _answer,
    Exception: _answer,
}
