"""The River dialect's server: gRPC beside the web server, in the same process and on the same services.

Bodies come as bytes and are parsed here, large ones beside the event loop, so that a client that sends 64 MiB does not
hold up everybody else's. Every call has an id, is counted and logged as an HTTP request is, and ends with a status
whose details are our sentence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from river_gateway.context import RequestContext
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.river_grpc.call import Call, Made, Methods, Streaming, Unary
from river_gateway.dialects.river_grpc.known_runs import KnownRuns
from river_gateway.dialects.river_grpc.limits import (
    CALLS_CONCURRENT_MAX,
    KEEPALIVE_S,
    KEEPALIVE_TIMEOUT_S,
    MESSAGE_MAX_BYTES,
    PING_INTERVAL_MIN_S,
)
from river_gateway.dialects.river_grpc.methods import METHODS
from river_gateway.dialects.river_grpc.statuses import code_of, details_of, trailers_of
from river_gateway.errors import MalformedBodyError, as_gateway_error
from river_gateway.limits import STOP_GRACE_S
from river_gateway.tenancy.auth import Principal, check_scopes

if TYPE_CHECKING:
    from river_gateway.services import Services
    from river_gateway.settings import Settings

logger = logging.getLogger("river.gateway")

SERVICE = "river.api.v1.RiverService"
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", round(PING_INTERVAL_MIN_S * 1000)),
    ("grpc.so_reuseport", 0),  # Two gateways on one port would be a mistake, not a feature.
)

Context = grpc.aio.ServicerContext[bytes, bytes]
NOBODY = Principal(tenant_id="", key_id="", scopes=frozenset(), expires_at=None)
"""Who asks where no key is needed."""


class RiverServerError(RuntimeError):
    """The server cannot be started; the message says why in a line."""


@asynccontextmanager
async def river_server(services: Services, settings: Settings) -> AsyncGenerator[int | None]:
    """Serves while the block runs and then drains; yields its port, None when the settings name none.

    Raises:
        RiverServerError: the certificate cannot be read, or the port is taken.
    """
    if not settings.grpc_port:
        yield None
        return
    credentials = None
    if settings.grpc_certificate is not None and settings.grpc_key is not None:
        credentials = _credentials(settings.grpc_key, settings.grpc_certificate)
    address = f"{settings.host}:{settings.grpc_port}"
    async with listening(services, address, credentials=credentials) as port:
        scheme = "grpc" if credentials is None else "grpcs"
        logger.info("the River dialect on %s://%s:%d", scheme, settings.host, port)
        yield port


@asynccontextmanager
async def listening(
    services: Services, address: str, *, credentials: grpc.ServerCredentials | None = None
) -> AsyncGenerator[int]:
    """The same on an address, `host:port`, whose port may be 0 for any."""
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=CALLS_CONCURRENT_MAX)
    entrance = _Entrance(services)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, entrance.handlers(METHODS)),)
    )
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise RiverServerError(f"cannot listen on {address}: {error}") from None
    await server.start()
    draining = asyncio.create_task(_drain_with(services.stopping, server), name="gRPC drain")
    try:
        yield port
    finally:
        draining.cancel()
        await server.stop(STOP_GRACE_S)


def _credentials(key_path: str, certificate_path: str) -> grpc.ServerCredentials:
    try:
        pair = (Path(key_path).read_bytes(), Path(certificate_path).read_bytes())
    except OSError as error:
        raise RiverServerError(f"the certificate or its key cannot be read: {error}") from None
    return grpc.ssl_server_credentials([pair])


async def _drain_with(stopping: asyncio.Event, server: grpc.aio.Server) -> None:
    """Takes no more calls once the process is to end; those in progress may finish within the grace."""
    await stopping.wait()
    await server.stop(STOP_GRACE_S)


class _Entrance:
    """What lies between a call's bytes and its handler: who asks, for what, and how it is told that it went wrong."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._known_runs = KnownRuns(services.pool)

    def handlers(self, methods: Methods) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Methods in gRPC's own form."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, method in methods.items():
            route = f"/{SERVICE}/{name}"
            if isinstance(method, Unary):
                handlers[name] = grpc.unary_unary_rpc_method_handler(self._unary(route, method))
            else:
                streaming = self._streaming(route, method)
                handlers[name] = grpc.unary_stream_rpc_method_handler(streaming)
        return handlers

    def _unary(self, route: str, method: Unary) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def answer(body: bytes, context: Context) -> bytes:
            async with self._reported(route, context) as request:
                call, asked = await self._read(method, body, request, context)
                return _encoded(await method.handle(call, asked))
            raise AssertionError("a failed call has been aborted")

        return answer

    def _streaming(
        self, route: str, method: Streaming
    ) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
        async def answer(body: bytes, context: Context) -> AsyncIterator[bytes]:
            async with self._reported(route, context) as request:
                call, asked = await self._read(method, body, request, context)
                async for made in method.handle(call, asked):
                    yield _encoded(made)

        return answer

    async def _read(
        self, method: Unary | Streaming, body: bytes, request: RequestContext, context: Context
    ) -> tuple[Call, Message]:
        """Who asks for what.

        Raises:
            UnauthenticatedError, PermissionDeniedError: see `auth`.
            MalformedBodyError: the body is no message of that type.
        """
        principal = NOBODY
        if method.scopes:
            headers = dict(context.invocation_metadata() or ())
            principal = await self._services.keys.authenticate(
                _text(headers.get("authorization")), _text(headers.get("x-api-key"))
            )
            request.tenant_id = principal.tenant_id
            check_scopes(principal, method.scopes)
        left_s = cast("float | None", context.time_remaining())
        deadline = None if left_s is None else time.monotonic() + left_s
        try:
            asked = await beside_the_loop(len(body), method.request.FromString, body)
        except DecodeError:
            name = method.request.DESCRIPTOR.name
            raise MalformedBodyError(f"the body is not a {name}") from None
        call = Call(self._services, self._known_runs, principal, request.request_id, deadline)
        return call, asked

    @asynccontextmanager
    async def _reported(self, route: str, context: Context) -> AsyncGenerator[RequestContext]:
        """Gives a call its id, ends it with a status if the block fails, and counts and logs it however it ends."""
        request = RequestContext(status=499)
        trailers = (("x-request-id", request.request_id),)
        try:
            context.set_trailing_metadata(trailers)
            yield request
            request.status = 200
        except Exception as error:  # noqa: BLE001 - every failure becomes a status
            refused = as_gateway_error(error, request)
            request.status = int(refused.status)
            await context.abort(
                code_of(refused.status),
                details_of(refused),
                trailers_of(refused, request.request_id),
            )
        finally:
            elapsed_s = time.perf_counter() - request.started_at
            self._services.telemetry.answered(route, "GRPC", request.status, elapsed_s)
            if logger.isEnabledFor(logging.INFO):
                outcome = {
                    "method": "GRPC",
                    "route": route,
                    "status": request.status,
                    "duration_ms": round(elapsed_s * 1000, 1),
                }
                logger.info("answered", extra=request.log_ids() | outcome)


def _encoded(made: Made) -> bytes:
    return made if isinstance(made, bytes) else made.SerializeToString()


def _text(value: str | bytes | None) -> str | None:
    return value.decode("latin-1") if isinstance(value, bytes) else value
