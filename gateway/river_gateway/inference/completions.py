"""A completion from the first byte to the last, as plain ASGI; what routes differ in is their dialect's affair.

This is the path that the gateway's cost is measured on, so it goes past Litestar's own: `app.py` sends requests to its
routes here directly. A body goes to the engine as it came but for `model` and `stream_options`; the engine's answer
comes back as it is, but for usage that the client has not asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from river_gateway.context import context_of
from river_gateway.disconnect import WhileClientStays
from river_gateway.errors import (
    ClientGoneError,
    TooLargeError,
    UnavailableError,
    as_gateway_error,
    error_answer,
)
from river_gateway.feedback.keeping import KeptStream, keeper_of, wants_keeping
from river_gateway.feedback.store import stored
from river_gateway.inference.asked import prompt_beginning, read_fields
from river_gateway.inference.messages_api import COUNT_TOKENS_PATH
from river_gateway.inference.metering import UsageTally, stream_quantities, usage_event
from river_gateway.inference.models import POLICY_VERSION_HEADER, Wish, ask_current, resolve_model
from river_gateway.inference.relay import relay
from river_gateway.inference.worst_case import worst_case
from river_gateway.limits import (
    BODY_MAX_BYTES,
    BYTES_PER_TOKEN,
    COMPLETION_GUESS_TOKENS,
    STREAM_KEEP_ALIVE_S,
)
from river_gateway.tenancy.auth import check_scopes, credentials
from river_gateway.tenancy.credit import UNBOUNDED

if TYPE_CHECKING:
    import msgspec
    from litestar.types import Receive, Scope, Send

    from river_billing.events import UsageEvent, UsageKind
    from river_gateway.context import RequestContext
    from river_gateway.engines.upstream import Opened
    from river_gateway.errors import GatewayError
    from river_gateway.feedback.keeping import Keeper
    from river_gateway.inference.asked import Asked
    from river_gateway.inference.dialects import Dialect, StreamReader
    from river_gateway.inference.models import Target
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal
    from river_gateway.tenancy.credit import Hold
    from river_gateway.tenancy.quotas import Ticket

_JSON = "application/json"
_JSON_HEADER = (b"content-type", b"application/json")
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_POLICY_HEADER = POLICY_VERSION_HEADER.encode()
_SCOPES = ("infer",)
_NULL = b"null"


class Completions:
    """The ASGI application of one route."""

    def __init__(self, services: Services, dialect: Dialect) -> None:
        self._services = services
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        scope["path_template"] = self._dialect.path
        try:
            principal, body = await self._ask(context, scope, receive)
            await self._complete(context, principal, body, _pin(scope), receive, send)
        except Exception as error:
            if context.status:
                raise  # The answer has begun; the server can only cut it off.
            await self._refuse(context, error, send)

    async def complete(
        self,
        context: RequestContext,
        principal: Principal,
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> None:
        """The same for a caller in this process who knows who asks and for what; `receive` says when nobody waits.

        Raises:
            GatewayError: it cannot be done; nothing has been sent then, or the answer is cut off.
        """
        check_scopes(principal, _SCOPES)
        self._services.meter.admit()
        await self._complete(context, principal, body, None, receive, send)

    async def _ask(
        self, context: RequestContext, scope: Scope, receive: Receive
    ) -> tuple[Principal, bytes]:
        """Who asks, and for what."""
        self._services.meter.admit()
        principal = await self._services.keys.authenticate(*credentials(scope))
        context.tenant_id = principal.tenant_id
        check_scopes(principal, _SCOPES)
        return principal, await _read_body(receive)

    async def _complete(
        self,
        context: RequestContext,
        principal: Principal,
        body: bytes,
        pin: str | None,
        receive: Receive,
        send: Send,
    ) -> None:
        services = self._services
        fields = read_fields(body)
        asked = self._dialect.read(body, fields)
        with services.quotas.admit(principal, asked.tokens_guessed(len(body))) as ticket:
            wish = Wish(pin=pin, stick=_stick(fields))
            target = await resolve_model(services, asked.model, principal.tenant_id, wish)
            context.base_model = target.base_model
            with await self._hold(principal, target, fields, len(body)) as hold:
                exchange = _Exchange(
                    services,
                    self._dialect,
                    context,
                    principal,
                    ticket,
                    hold,
                    asked,
                    target,
                )
                await self._exchange(exchange, body, fields, receive, send)

    async def _hold(
        self,
        principal: Principal,
        target: Target,
        fields: dict[str, msgspec.Raw],
        body_bytes: int,
    ) -> Hold:
        """What the request may cost, held before any work is done for it.

        Raises:
            OutOfCreditError: there is less.
            UnavailableError: that cannot be known at the moment.
        """
        if not principal.bounded or self._dialect.path == COUNT_TOKENS_PATH:
            return UNBOUNDED
        engine = self._services.engines.last_of(target.base_model)
        if engine is None:
            raise UnavailableError(
                f"no engine of {target.base_model!r} has registered yet; try again"
            )
        worst = worst_case(
            self._dialect.path, fields, body_bytes=body_bytes, context_length=engine.context_length
        )
        credit, tier = self._services.credit, (target.base_model, engine.context_length)
        return credit.try_hold(principal, *tier, worst) or await credit.hold(
            principal, *tier, worst
        )

    async def _exchange(
        self,
        exchange: _Exchange,
        body: bytes,
        fields: dict[str, msgspec.Raw],
        receive: Receive,
        send: Send,
    ) -> None:
        asked = exchange.asked
        keeper = None
        if wants_keeping(fields):
            exchange.services.completions.admit()
            exchange.keeper = keeper = keeper_of(self._dialect.path, fields)
            fields = keeper.engine_fields(fields)
        if asked.stream:
            usage = self._dialect.stream_reader(asked)
            if keeper is not None:
                usage = KeptStream(usage, keeper)
            async with WhileClientStays(receive):
                opened = await self._open(exchange, body, fields)
            await exchange.stream(opened, usage, receive, send)
            return
        async with WhileClientStays(receive):
            opened = await self._open(exchange, body, fields)
            answer = await opened.read()
        await exchange.answer(opened, keeper.whole(answer) if keeper else answer, send)

    async def _open(
        self, exchange: _Exchange, body: bytes, fields: dict[str, msgspec.Raw]
    ) -> Opened:
        """The engine's answer, its head read; `exchange` learns who answers."""
        asked = exchange.asked
        tenant_id = exchange.principal.tenant_id
        for_engine = self._dialect.engine_body(fields, asked, exchange.target.base_model)
        affinity = tenant_id.encode() + prompt_beginning(fields)
        completion_tokens = asked.choices_per_prompt * COMPLETION_GUESS_TOKENS
        tokens = len(body) // BYTES_PER_TOKEN + completion_tokens

        async def ask(target: Target) -> Opened:
            return await self._services.upstream.open(
                self._dialect.path,
                for_engine,
                target=target,
                tenant_id=tenant_id,
                request_id=exchange.context.request_id,
                content_type=_JSON,
                model_name=asked.model,
                affinity=affinity,
                tokens=tokens,
                may_hedge=True,
            )

        exchange.target, opened = await ask_current(self._services, tenant_id, exchange.target, ask)
        return opened

    async def _refuse(self, context: RequestContext, error: Exception, send: Send) -> None:
        answer = error_answer(
            as_gateway_error(error, context), path=self._dialect.path, request_id=context.request_id
        )
        headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await _send_whole(send, answer.status, [_JSON_HEADER, *headers], answer.body)


@dataclass(slots=True)
class _Exchange:
    """One request that will be answered: who asks for what, who answers, and what it has used."""

    services: Services
    dialect: Dialect
    context: RequestContext
    principal: Principal
    ticket: Ticket
    hold: Hold
    asked: Asked
    target: Target
    keeper: Keeper | None = None
    _settled: bool = field(default=False)

    async def answer(self, opened: Opened, body: bytes, send: Send) -> None:
        """Sends a whole answer, once its usage is stored."""
        tally = UsageTally()
        tally.finish(self.dialect.usage_of(body))
        await self._settle(opened, tally.quantities())
        await self._keep()
        await _send_whole(send, 200, [_JSON_HEADER, *self._headers()], body)

    async def stream(
        self, opened: Opened, usage: StreamReader, receive: Receive, send: Send
    ) -> None:
        """Sends a stream on as it comes; its usage is stored before its end, or what there was of it if none comes."""

        async def settle() -> None:
            await self._settle(opened, usage.quantities())
            if usage.done:
                await self._keep()

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [*_STREAM_HEADERS, *self._headers()],
                }
            )
            await relay(
                opened,
                usage,
                receive=receive,
                send=send,
                settle=settle,
                keep_alive=self.dialect.keep_alive,
                keep_alive_s=STREAM_KEEP_ALIVE_S,
                error_event=self._error_event,
                begun=self._begun,
            )
            if not self._settled:  # The client has left in the middle.
                opened.close()
                await self._settle_cut(opened, usage)
        finally:
            opened.close()
            self._settle_later(opened, usage)

    def _begun(self) -> None:
        self.context.first_token_s = time.perf_counter() - self.context.started_at

    def _error_event(self, error: GatewayError) -> bytes:
        """What a stream that has begun ends with."""
        self.context.broken = True
        self.context.problem = error.message
        return self.dialect.error_event(error, self.context.request_id)

    async def _settle(self, opened: Opened, quantities: dict[UsageKind, int]) -> None:
        if self._settled:
            return
        # The meter has the event from here on, even if this request is cancelled while it waits.
        await self.services.meter.record(self._bill(opened, quantities))

    async def _settle_cut(self, opened: Opened, usage: StreamReader) -> None:
        """By what the engine produced, which may be more than has been read; by that if the engine cannot say."""
        produced = await self.services.upstream.final_usage(opened.engine, self.context.request_id)
        await self._settle(
            opened, usage.quantities() if produced is None else stream_quantities(produced)
        )

    async def _keep(self) -> None:
        """Stores the completion, if that was asked for and is not done."""
        keeper, self.keeper = self.keeper, None
        if keeper is None:
            return
        row = stored(
            keeper,
            tenant_id=self.principal.tenant_id,
            model=self.asked.model,
            target=self.target,
        )
        if row is not None:
            await self.services.completions.add(row)

    def _settle_later(self, opened: Opened, usage: StreamReader) -> None:
        if not self._settled:
            self.services.meter.record_later(self._bill(opened, usage.quantities()))

    def _bill(self, opened: Opened, quantities: dict[UsageKind, int]) -> UsageEvent | None:
        """What is to be recorded of the request; made once."""
        assert not self._settled
        self._settled = True
        self.ticket.settle(sum(quantities.values()))
        return usage_event(
            request_id=self.context.request_id,
            principal=self.principal,
            target=self.target,
            context_length=opened.engine.context_length,
            quantities=quantities,
            user=self.asked.user,
            hold=self.hold,
        )

    def _headers(self) -> list[tuple[bytes, bytes]]:
        policy = (_POLICY_HEADER, self.target.policy_version.encode())
        return [policy, *self.dialect.headers(self.context.request_id), *self.ticket.headers]


def _pin(scope: Scope) -> str | None:
    """The version that the request insists on."""
    for name, value in scope["headers"]:
        if name == _POLICY_HEADER:
            return value.decode("latin-1")
    return None


def _stick(fields: dict[str, msgspec.Raw]) -> bytes | None:
    """What requests have in common that should be answered by one version."""
    for name in ("prompt_cache_key", "user"):
        value = fields.get(name)
        if value is not None and bytes(value) != _NULL:
            return bytes(value)
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
