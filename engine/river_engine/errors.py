"""Why an engine refuses a request; each maps to one HTTP status and an `EngineError` body.

EngineRefusal
├── InvalidField      422  a field is wrong; `param` names it with its index
├── InvalidAdapter    422  the adapter's files are not ones this engine can serve
├── AdapterNotFound   404  there are no such files
├── AdapterLoading    503  it is still being loaded when the request has waited long enough
├── Unauthorized      401  no or wrong token
├── TooLarge          413  the body or a header is over its bound
├── EngineFull        429  too many requests are waiting
├── EngineDraining    503  the engine takes no new requests: it is about to stop
└── EngineBusy        503  the engine is going down
"""

from __future__ import annotations

from river_engine.protocol import ADAPTER_LOADING, EngineError


class EngineRefusal(Exception):  # noqa: N818 - the request's error, not the engine's
    """Base of all refusals.

    `status` is the HTTP status, `type_name` the `type` of the body, `param` the field at fault, `retry_after_s` when
    asking again makes sense.
    """

    status = 500
    type_name = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> EngineError:
        return EngineError(type=self.type_name, message=self.message, param=self.param)


class InvalidField(EngineRefusal):
    status = 422
    type_name = "invalid_request_error"


class InvalidAdapter(EngineRefusal):
    status = 422
    type_name = "invalid_adapter"


class AdapterNotFound(EngineRefusal):
    status = 404
    type_name = "not_found"


class AdapterLoading(EngineRefusal):
    status = 503
    type_name = ADAPTER_LOADING


class Unauthorized(EngineRefusal):
    status = 401
    type_name = "authentication_error"


class TooLarge(EngineRefusal):
    status = 413
    type_name = "request_too_large"


class EngineFull(EngineRefusal):
    status = 429
    type_name = "busy"


class EngineDraining(EngineRefusal):
    status = 503
    type_name = "draining"


class EngineBusy(EngineRefusal):
    status = 503
    type_name = "unavailable"
