"""Work that a client asks for now and collects later: kept by the gateway that took it, found from every other.

A request id names the gateway that holds the work, so another one asks it over NATS. What a gateway holds ends with it:
whoever collects then is told so (`GoneError`) and asks anew, which loses nothing but time: samples change nothing.

Work that cannot be taken now, because of a limit or because no engine answers, is tried again until `FUTURE_PATIENCE_S`
have passed; what it is waiting for can be told meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from river_gateway.bus import BusError
from river_gateway.context import RequestContext
from river_gateway.errors import (
    GatewayError,
    GoneError,
    NotFoundError,
    RateLimitedError,
    TooLargeError,
    UnavailableError,
    as_gateway_error,
)
from river_gateway.limits import (
    FUTURE_MAX_BYTES,
    FUTURE_PATIENCE_S,
    FUTURES_COLLECTED_KEPT_S,
    FUTURES_KEPT_MAX_BYTES,
    FUTURES_KEPT_S,
    FUTURES_MAX,
    FUTURES_MAX_BYTES,
    FUTURES_OF_TENANT_MAX,
    FUTURES_OF_TENANT_MAX_BYTES,
    FUTURES_RUNNING_OF_TENANT_MAX,
    FUTURES_SWEEP_INTERVAL_S,
    RETRY_AFTER_S,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg

    from river_gateway.bus import Bus

logger = logging.getLogger("river.gateway")

_REQUEST_ID = re.compile(r"fut_(?P<gateway>[0-9a-f]{16})_(?P<number>[0-9a-f]{1,16})")
_ANSWER_MARGIN_S = 5.0
"""How much longer than the wait itself another gateway's answer is waited for."""
_ENTRY_BYTES = 2048
"""What an entry takes beside the bodies, about."""


# ---- Outcomes --------------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What is known of a piece of work."""


class Pending(Outcome, frozen=True, tag="pending"):
    """`reason` is a sentence that says what it waits for, None while it is being worked on."""

    reason: str | None = None


class Done(Outcome, frozen=True, tag="done"):
    """`body` is what the work returned."""

    body: bytes


class Large(Outcome, frozen=True, tag="large"):
    """It is done, and its body larger than was wanted; it is kept as long as if nobody had asked."""

    size_bytes: int


class Failed(Outcome, frozen=True, tag="failed"):
    """A `GatewayError` as it travels between gateways."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None


class Gone(Outcome, frozen=True, tag="gone"):
    """It was there once, and is kept no longer."""


class Unknown(Outcome, frozen=True, tag="unknown"):
    """It was never there, or is another tenant's."""


AnyOutcome = Pending | Done | Large | Failed | Gone | Unknown


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway asks another about a request that the other holds."""

    tenant_id: str
    request_id: str
    timeout_s: float
    body_max_bytes: int | None = None
    cancel: bool = False


@dataclass(slots=True)
class _Entry:
    """Times of a steady clock. `asked_bytes` is what the work itself keeps until it is done."""

    tenant_id: str
    identity: str | None
    made_at: float
    asked_bytes: int
    outcome: Done | Failed | None = None
    reason: str | None = None
    done_at: float | None = None
    collected_at: float | None = None
    task: asyncio.Task[bytes] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def size_bytes(self) -> int:
        """What is kept of it, once it is done."""
        body = self.outcome.body if isinstance(self.outcome, Done) else b""
        return _ENTRY_BYTES + len(body)


@dataclass(slots=True)
class _TenantWork:
    """How much of a tenant's work there is, and how much is kept of it; `running` lets so much of it run at once."""

    unfinished: int = 0
    asked_bytes: int = 0
    kept_bytes: int = 0
    running: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(FUTURES_RUNNING_OF_TENANT_MAX)
    )


# ---- The gateway's own -----------------------------------------------------------------------------------------------


class Futures:
    """All work of this gateway that somebody will collect, and the way to that of the others."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._gateway = secrets.token_hex(8)
        self._entries: dict[str, _Entry] = {}
        self._identities: dict[tuple[str, str], str] = {}
        self._tenants: dict[str, _TenantWork] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._made = 0
        self._unfinished = 0
        self._asked_bytes = 0
        self._kept_bytes = 0
        self._stopped = False

    def submit(
        self,
        tenant_id: str,
        work: Callable[[], Awaitable[bytes]],
        *,
        asked_bytes: int,
        identity: str | None = None,
    ) -> str:
        """The id under which the result of `work` can be collected, or that of what is known by `identity` already.

        `work` may be called several times, each after a `RateLimitedError` or `UnavailableError` of the one before.
        `asked_bytes` is about what it keeps in memory until then. A result larger than `FUTURE_MAX_BYTES` fails.

        Raises:
            RateLimitedError: the tenant, or everybody together, has more unfinished work than is kept.
        """
        if identity is not None:
            known = self._identities.get((tenant_id, identity))
            if known is not None:
                return known
        self._check_room(tenant_id, asked_bytes)
        self._made += 1
        request_id = f"fut_{self._gateway}_{self._made:x}"
        entry = _Entry(tenant_id, identity, time.monotonic(), asked_bytes)
        self._entries[request_id] = entry
        if identity is not None:
            self._identities[tenant_id, identity] = request_id
        tenant = self._tenants.setdefault(tenant_id, _TenantWork())
        tenant.unfinished += 1
        tenant.asked_bytes += asked_bytes
        self._unfinished += 1
        self._asked_bytes += asked_bytes
        entry.task = asyncio.create_task(self._patiently(entry, tenant, work), name=request_id)
        entry.task.add_done_callback(lambda task: self._finish(request_id, entry, task))
        return request_id

    async def result(
        self,
        tenant_id: str,
        request_id: str,
        timeout_s: float,
        *,
        body_max_bytes: int | None = None,
    ) -> AnyOutcome:
        """What has come of a piece of work, waiting up to `timeout_s` for its end: `Pending`, `Done` or `Failed`.

        With `body_max_bytes` a larger body is only announced, as `Large`, to be collected when there is room for it.

        Raises:
            NotFoundError: there is no such request.
            GoneError: its result is no longer kept, or the gateway that held it is gone.
            UnavailableError: another gateway holds it, and NATS is not reachable.
        """
        return await self._put(
            Question(
                tenant_id=tenant_id,
                request_id=request_id,
                timeout_s=timeout_s,
                body_max_bytes=body_max_bytes,
            )
        )

    async def cancel(self, tenant_id: str, request_id: str) -> None:
        """Ends a piece of work that nobody wants any more; what is done already stays.

        Raises:
            As `result`.
        """
        await self._put(
            Question(tenant_id=tenant_id, request_id=request_id, timeout_s=0.0, cancel=True)
        )

    # ---- For as long as the gateway runs -----------------------------------------------------------------------------

    async def listen(self) -> None:
        """Begins to answer the other gateways; lasts as long as the connection, and returns with it."""
        await self._bus.hear(_subject(self._gateway), self._hear)

    async def run(self, stopping: asyncio.Event) -> None:
        """Forgets what is old, until cancelled; once `stopping` is set, whoever waits is answered at once."""
        while not self._stopped:
            with suppress(TimeoutError):
                async with asyncio.timeout(FUTURES_SWEEP_INTERVAL_S):
                    await stopping.wait()
                self._stopped = True
            self._sweep(time.monotonic())
        for entry in self._entries.values():
            entry.changed.set()

    async def close(self) -> None:
        """Ends all work."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in (*tasks, *self._answering):
            task.cancel()
        await asyncio.gather(*tasks, *self._answering, return_exceptions=True)

    # ---- Working -----------------------------------------------------------------------------------------------------

    def _check_room(self, tenant_id: str, asked_bytes: int) -> None:
        tenant = self._tenants.get(tenant_id, _TenantWork())
        if tenant.unfinished >= FUTURES_OF_TENANT_MAX:
            raise RateLimitedError(
                f"{tenant.unfinished} requests are unfinished, at most {FUTURES_OF_TENANT_MAX} at once",
                retry_after_s=RETRY_AFTER_S,
            )
        if tenant.unfinished and tenant.asked_bytes + asked_bytes > FUTURES_OF_TENANT_MAX_BYTES:
            raise RateLimitedError(
                f"{tenant.asked_bytes} bytes of unfinished requests wait, at most "
                f"{FUTURES_OF_TENANT_MAX_BYTES} at once",
                retry_after_s=RETRY_AFTER_S,
            )
        is_full = self._asked_bytes + asked_bytes > FUTURES_MAX_BYTES
        if is_full or self._unfinished >= FUTURES_MAX:
            raise RateLimitedError(
                "this server has as much unfinished work as it takes; try again",
                retry_after_s=RETRY_AFTER_S,
            )

    async def _patiently(
        self, entry: _Entry, tenant: _TenantWork, work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """What `work` returns, once limits and engines let it."""
        give_up_at = entry.made_at + FUTURE_PATIENCE_S
        while True:
            try:
                async with tenant.running:
                    return await work()
            except (RateLimitedError, UnavailableError) as error:
                pause_s = error.retry_after_s or RETRY_AFTER_S
                if time.monotonic() + pause_s > give_up_at:
                    raise
                entry.reason = error.message
            await asyncio.sleep(pause_s)
            entry.reason = None

    def _finish(self, request_id: str, entry: _Entry, task: asyncio.Task[bytes]) -> None:
        entry.outcome = _outcome(request_id, entry, task)
        entry.task = None
        entry.done_at = time.monotonic()
        tenant = self._tenants[entry.tenant_id]
        tenant.unfinished -= 1
        tenant.asked_bytes -= entry.asked_bytes
        self._unfinished -= 1
        self._asked_bytes -= entry.asked_bytes
        tenant.kept_bytes += entry.size_bytes
        self._kept_bytes += entry.size_bytes
        entry.changed.set()
        while self._kept_bytes > FUTURES_KEPT_MAX_BYTES:
            self._make_room()

    # ---- Forgetting --------------------------------------------------------------------------------------------------

    def _sweep(self, now: float) -> None:
        old = [
            request_id
            for request_id, entry in self._entries.items()
            if (entry.done_at is not None and now - entry.done_at > FUTURES_KEPT_S)
            or (
                entry.collected_at is not None
                and now - entry.collected_at > FUTURES_COLLECTED_KEPT_S
            )
        ]
        for request_id in old:
            self._forget(request_id)

    def _make_room(self) -> None:
        """Forgets finished work of the tenant of whom most is kept, a quarter of it: what was collected first."""
        owner, tenant = max(self._tenants.items(), key=lambda item: item[1].kept_bytes)
        finished = [
            (entry.collected_at is None, entry.done_at, request_id)
            for request_id, entry in self._entries.items()
            if entry.done_at is not None and entry.tenant_id == owner
        ]
        enough = tenant.kept_bytes * 3 // 4
        for *_, request_id in sorted(finished):
            self._forget(request_id)
            if tenant.kept_bytes <= enough:
                return

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        tenant = self._tenants[entry.tenant_id]
        tenant.kept_bytes -= entry.size_bytes
        self._kept_bytes -= entry.size_bytes
        if entry.identity is not None:
            del self._identities[entry.tenant_id, entry.identity]
        if not tenant.unfinished and not tenant.kept_bytes:
            del self._tenants[entry.tenant_id]

    # ---- Collecting --------------------------------------------------------------------------------------------------

    async def _put(self, question: Question) -> AnyOutcome:
        """The answer to a question, from wherever it is known."""
        match = _REQUEST_ID.fullmatch(question.request_id)
        outcome: AnyOutcome = Unknown()
        if match is not None and match["gateway"] == self._gateway:
            outcome = await self._look(question)
        elif match is not None:
            outcome = await self._ask(match["gateway"], question)
        if isinstance(outcome, Unknown):
            raise NotFoundError(f"there is no request {question.request_id!r}", param="request_id")
        if isinstance(outcome, Gone):
            raise GoneError(
                f"{question.request_id} is not kept any more; ask for it again", param="request_id"
            )
        return outcome

    async def _look(self, question: Question) -> AnyOutcome:
        """The same, of this gateway's own."""
        entry = self._entries.get(question.request_id)
        if entry is None:
            match = _REQUEST_ID.fullmatch(question.request_id)
            was_made = match is not None and 0 < int(match["number"], 16) <= self._made
            return Gone() if was_made else Unknown()
        if entry.tenant_id != question.tenant_id:
            return Unknown()
        if question.cancel and entry.task is not None:
            entry.task.cancel()
        if entry.outcome is None and question.timeout_s > 0 and not self._stopped:
            with suppress(TimeoutError):
                async with asyncio.timeout(question.timeout_s):
                    await entry.changed.wait()
        if entry.outcome is None:
            return Pending(reason=entry.reason)
        if question.body_max_bytes is not None and isinstance(entry.outcome, Done):
            size_bytes = len(entry.outcome.body)
            if size_bytes > question.body_max_bytes:
                return Large(size_bytes=size_bytes)
        entry.collected_at = entry.collected_at or time.monotonic()
        return entry.outcome

    async def _ask(self, gateway: str, question: Question) -> AnyOutcome:
        """The same, of another gateway's; one that takes too long may still be working on it."""
        self._bus.require()
        answer = await self._bus.ask_at_length(
            _subject(gateway),
            msgspec.msgpack.encode(question),
            timeout_s=question.timeout_s + _ANSWER_MARGIN_S,
        )
        if answer is None:
            return Gone()
        return msgspec.msgpack.decode(answer, type=AnyOutcome) if answer else Pending()

    async def _hear(self, message: Msg) -> None:
        """Answers another gateway, without keeping the next one's question waiting."""
        task = asyncio.create_task(self._answer(message), name="answering a gateway")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Msg) -> None:
        try:
            question = msgspec.msgpack.decode(message.data, type=Question)
        except msgspec.DecodeError as error:
            logger.warning("unreadable question of a gateway: %s", error)
            return
        outcome = await self._look(question)
        try:
            await self._bus.answer_at_length(message, msgspec.msgpack.encode(outcome))
        except BusError as error:
            logger.warning("a gateway's question stays without an answer: %s", error)


def _subject(gateway: str) -> str:
    return f"futures.{gateway}"


def _outcome(request_id: str, entry: _Entry, task: asyncio.Task[bytes]) -> Done | Failed:
    if task.cancelled():
        return _failed(GoneError("the request was cancelled"))
    error = task.exception()
    if error is None and len(task.result()) > FUTURE_MAX_BYTES:
        return _failed(TooLargeError(f"the result is larger than {FUTURE_MAX_BYTES} bytes"))
    if error is None:
        return Done(body=task.result())
    if not isinstance(error, Exception):
        raise error
    context = RequestContext(request_id=request_id, tenant_id=entry.tenant_id)
    return _failed(as_gateway_error(error, context))


def _failed(error: GatewayError) -> Failed:
    return Failed(
        status=error.status,
        type=error.type,
        message=error.message,
        code=error.code,
        param=error.param,
    )
