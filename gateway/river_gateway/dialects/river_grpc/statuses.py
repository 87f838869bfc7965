"""Our errors as gRPC statuses, chosen by what the River client makes of them.

The client sends again, for half an hour, what was UNAVAILABLE; a poll of a result also what was RESOURCE_EXHAUSTED,
ABORTED, INTERNAL or UNKNOWN, a few times. The rest it raises at once. So what mends itself is UNAVAILABLE, what a
client should slow down for RESOURCE_EXHAUSTED, and whatever a second try would not mend none of these. Our sentence is
the status's details, and the code for programs travels in `river-error-code`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import grpc

from river_gateway.dialects.river_grpc.limits import DETAILS_MAX_CHARS

if TYPE_CHECKING:
    from river_gateway.errors import GatewayError

_CODES = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.PAYMENT_REQUIRED: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.GONE: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNPROCESSABLE_ENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    HTTPStatus.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.INSUFFICIENT_STORAGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def code_of(status: int) -> grpc.StatusCode:
    """The gRPC status of one of HTTP's."""
    code = _CODES.get(status)
    if code is not None:
        return code
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return grpc.StatusCode.INTERNAL
    return grpc.StatusCode.INVALID_ARGUMENT


def details_of(error: GatewayError) -> str:
    """The sentence for people, cut to what fits a trailer."""
    if len(error.message) <= DETAILS_MAX_CHARS:
        return error.message
    return error.message[: DETAILS_MAX_CHARS - 1] + "…"


def trailers_of(error: GatewayError, request_id: str) -> tuple[tuple[str, str], ...]:
    """What goes with a failed call beside its status."""
    trailers = [("x-request-id", request_id), ("river-error-code", error.code or error.type)]
    if error.retry_after_s is not None:
        trailers.append(("retry-after-ms", str(round(error.retry_after_s * 1000))))
    return tuple(trailers)
