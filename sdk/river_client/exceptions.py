"""Everything the SDK raises.

    RiverError
    ├── AuthenticationError        401  no key, or a wrong one
    ├── PermissionDeniedError      403  the key lacks the scope
    ├── NotFoundError              404  unknown, or not yours
    ├── InvalidRequestError        400, 409, 413, 422  names the field, and the index where there is one
    ├── OutOfCreditError           402
    ├── RateLimitError             429  says how long to wait
    ├── ServerError                5xx
    ├── ConnectionError            the server could not be reached (also a builtin ConnectionError)
    ├── TimeoutError               your own timeout passed; the operation goes on (also a builtin TimeoutError)
    └── OperationFailedError       an accepted operation failed in the trainer

All can be pickled, so they cross process pools.
"""

from __future__ import annotations

import builtins
import re

_INDEXED = re.compile(r"(?P<field>.+)\[(?P<index>\d+)\]")


class RiverError(Exception):
    """Root of all errors of the SDK.

    `status` is the HTTP status where there was one, `type` the server's own word for the error, `request_id` what to
    tell its operator, `retry_after` the seconds after which the server wants to be asked again. `may_be_done` says that
    an attempt stayed without a clear answer: what was asked for may have been done.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        type: str | None = None,  # noqa: A002 - as on the wire
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.may_be_done = False


class AuthenticationError(RiverError):
    """There is no API key, or the server does not know it."""


class PermissionDeniedError(RiverError):
    """The key may not do this."""


class NotFoundError(RiverError):
    """There is no such thing, or it belongs to somebody else."""


class InvalidRequestError(RiverError, ValueError):
    """Something in the request is wrong; nothing was done.

    `param` names it, such as `data[3].input_ids[17]`; `field` is that without its last index, `data[3].input_ids`, and
    `index` that index, 17, or None where the whole field is meant.
    """

    @property
    def field(self) -> str | None:
        """`param` without its last index."""
        match = _INDEXED.fullmatch(self.param or "")
        return match["field"] if match else self.param

    @property
    def index(self) -> int | None:
        """The last index in `param`; None where the whole field is meant."""
        match = _INDEXED.fullmatch(self.param or "")
        return int(match["index"]) if match else None


class OutOfCreditError(RiverError):
    """The tenant has no credit left."""


class RateLimitError(RiverError):
    """Too much at once, for longer than retrying could bridge."""


class ServerError(RiverError):
    """The server failed, or was not ready for longer than retrying could bridge."""


class ConnectionError(RiverError, builtins.ConnectionError):  # noqa: A001 - its name in the documentation
    """The server could not be reached, or went away.

    An operation that was being submitted may still be carried out. Calling again with the same arguments submits the
    same operation, never a second one.
    """


class TimeoutError(RiverError, builtins.TimeoutError):  # noqa: A001 - its name in the documentation
    """The timeout passed before the result came; `client.operation(error.operation_id)` still gets it."""

    def __init__(self, message: str = "", *, operation_id: str | None = None) -> None:
        super().__init__(message)
        self.operation_id = operation_id


class OperationFailedError(RiverError):
    """The trainer could not carry out an accepted operation; the run is as it was before."""

    def __init__(
        self,
        message: str = "",
        *,
        operation_id: str | None = None,
        type: str | None = None,  # noqa: A002 - as on the wire
        param: str | None = None,
    ) -> None:
        super().__init__(message, type=type, param=param)
        self.operation_id = operation_id
