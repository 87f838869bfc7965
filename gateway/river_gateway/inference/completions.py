"""A completion from the first byte to the last, as plain ASGI.

This is the path that the gateway's cost is measured on, so it goes past Litestar's own: `app.py` sends requests to its
routes here directly. A body goes to the engine as it came but for `model` and `stream_options`; the engine's answer
comes back as it is, but for usage that the client has not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from river_gateway.context import context_of
from river_gateway.disconnect import WhileClientStays
from river_gateway.engines.http_client import EngineLostError
from river_gateway.errors import (
    ClientGoneError,
    TooLargeError,
    UnavailableError,
    as_gateway_error,
    error_answer,
)
from river_gateway.inference.asked import engine_body, read_asked
from river_gateway.inference.metering import Chunk, UsageTally, usage_event
from river_gateway.inference.models import ask_current, resolve_model
from river_gateway.inference.relay import relay
from river_gateway.inference.sse import UsageFilter
from river_gateway.limits import BODY_MAX_BYTES, BYTES_PER_TOKEN, ROUTING_PREFIX_BYTES
from river_gateway.tenancy.auth import check_scopes

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send

    from river_billing.events import UsageEvent, UsageKind
    from river_gateway.context import RequestContext
    from river_gateway.engines.upstream import Opened
    from river_gateway.inference.asked import Asked
    from river_gateway.inference.models import Target
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_JSON = "application/json"
_JSON_HEADER = (b"content-type", b"application/json")
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_POLICY_HEADER = b"x-river-policy-version"
_SCOPES = ("infer",)

_usage_decoder = msgspec.json.Decoder(Chunk)


class Completions:
    """The ASGI application of one route; `path` is the engine's too."""

    def __init__(self, services: Services, path: str) -> None:
        self._services = services
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        scope["path_template"] = self._path
        try:
            await self._complete(context, scope, receive, send)
        except Exception as error:
            if context.status:
                raise  # The answer has begun; the server can only cut it off.
            await self._refuse(context, error, send)

    async def _complete(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        services = self._services
        services.meter.admit()
        principal = await services.keys.authenticate(_authorization(scope))
        context.tenant_id = principal.tenant_id
        check_scopes(principal, _SCOPES)
        body = await _read_body(receive)
        asked = read_asked(body)
        target = await resolve_model(services, asked.model, principal.tenant_id)
        exchange = _Exchange(services, context.request_id, principal, asked, target)
        if asked.stream:
            usage = UsageFilter(
                asked.wishes, choices_per_prompt=asked.choices_per_prompt, single=asked.single
            )
            async with WhileClientStays(receive):
                opened = await self._open(exchange, body)
            await exchange.stream(opened, usage, receive, send)
            return
        async with WhileClientStays(receive):
            opened = await self._open(exchange, body)
            try:
                answer = await opened.answer.read()
            except EngineLostError:
                raise UnavailableError("the engine was lost in the middle of the answer") from None
            finally:
                opened.close()
        await exchange.answer(opened, answer, send)

    async def _open(self, exchange: _Exchange, body: bytes) -> Opened:
        """The engine's answer, its head read; `exchange` learns who answers."""
        asked = exchange.asked
        tenant_id = exchange.principal.tenant_id
        for_engine = engine_body(body, asked, exchange.target.base_model)
        affinity = tenant_id.encode() + body[:ROUTING_PREFIX_BYTES]
        tokens = len(body) // BYTES_PER_TOKEN

        async def ask(target: Target) -> Opened:
            return await self._services.upstream.open(
                self._path,
                for_engine,
                target=target,
                tenant_id=tenant_id,
                request_id=exchange.request_id,
                content_type=_JSON,
                model_name=asked.model,
                affinity=affinity,
                tokens=tokens,
            )

        exchange.target, opened = await ask_current(
            self._services, asked.model, tenant_id, exchange.target, ask
        )
        return opened

    async def _refuse(self, context: RequestContext, error: Exception, send: Send) -> None:
        answer = error_answer(
            as_gateway_error(error, context), path=self._path, request_id=context.request_id
        )
        headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await _send_whole(send, answer.status, [_JSON_HEADER, *headers], answer.body)


@dataclass(slots=True)
class _Exchange:
    """One request that will be answered: who asks for what, who answers, and what it has used."""

    services: Services
    request_id: str
    principal: Principal
    asked: Asked
    target: Target
    _settled: bool = field(default=False)

    async def answer(self, opened: Opened, body: bytes, send: Send) -> None:
        """Sends a whole answer, once its usage is stored."""
        tally = UsageTally()
        tally.finish(_usage_decoder.decode(body).usage)
        await self._settle(opened, tally.quantities())
        await _send_whole(send, 200, [_JSON_HEADER, self._policy()], body)

    async def stream(
        self, opened: Opened, usage: UsageFilter, receive: Receive, send: Send
    ) -> None:
        """Sends a stream on as it comes; its usage is stored before its end, or what there was of it if none comes."""

        async def settle() -> None:
            await self._settle(opened, usage.quantities())

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [*_STREAM_HEADERS, self._policy()],
                }
            )
            await relay(opened, usage, receive=receive, send=send, settle=settle)
        finally:
            opened.close()
            self._settle_later(opened, usage)

    async def _settle(self, opened: Opened, quantities: dict[UsageKind, int]) -> None:
        if self._settled:
            return
        # The meter has the event from here on, even if this request is cancelled while it waits.
        self._settled = True
        await self.services.meter.record(self._event(opened, quantities))

    def _settle_later(self, opened: Opened, usage: UsageFilter) -> None:
        if self._settled:
            return
        self._settled = True
        self.services.meter.record_later(self._event(opened, usage.quantities()))

    def _event(self, opened: Opened, quantities: dict[UsageKind, int]) -> UsageEvent | None:
        return usage_event(
            request_id=self.request_id,
            principal=self.principal,
            target=self.target,
            context_length=opened.engine.context_length,
            quantities=quantities,
            user=self.asked.user,
        )

    def _policy(self) -> tuple[bytes, bytes]:
        return (_POLICY_HEADER, self.target.policy_version.encode())


def _authorization(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            return value.decode("latin-1")
    return None


async def _read_body(receive: Receive) -> bytes:
    """The request's body.

    Raises:
        TooLargeError: it has more than `BODY_MAX_BYTES`.
        ClientGoneError: the client left before its end.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client closed the connection")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > BODY_MAX_BYTES:
            raise TooLargeError("the body is larger than this server takes")
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _send_whole(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
