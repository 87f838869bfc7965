"""Who is asking: API keys, their tenants, scopes and limits. Only the SHA-256 of a key is stored or compared."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from river_client.wire import Limits
from river_gateway.context import context_of
from river_gateway.database import POSTGRES_AWAY, POSTGRES_FAILED
from river_gateway.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError
from river_gateway.limits import (
    KEY_CACHE_ENTRIES_MAX,
    KEY_CACHE_FRESH_S,
    KEY_CACHE_STALE_MAX_S,
    KEY_MAX_CHARS,
    KEY_RETRY_S,
    KEY_USE_NOTED_S,
)
from river_gateway.lru import Lru
from river_gateway.tenancy.messages import AccountChanged

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Awaitable, Callable, Sequence

    from litestar import Request
    from litestar.connection import ASGIConnection
    from litestar.handlers import BaseRouteHandler
    from litestar.types import Scope
    from nats.aio.msg import Msg

    from river_gateway.database import Database, Row

logger = logging.getLogger("river.gateway")

KEY_PREFIX, TINKER_PREFIX = "rv-", "tml-"
SCOPES = ("infer", "train", "admin")
_PRINCIPAL = "river_principal"

# ---- Authentication --------------------------------------------------------------------------------------------------

# A secret that was replaced ends when its grace is over, if not with the key.
_KEYS = """
select
  key_id, tenant_id, scopes, revoked_at,
  case when {replaced} then least(expires_at, previous_until) else expires_at end as expires_at,
  revoked_at is null and (last_used_at is null or last_used_at < now() - make_interval(secs => {noted_s})) as unnoted,
  api_key.requests_per_minute, api_key.tokens_per_minute, api_key.concurrent_requests,
  tenant.requests_per_minute as tenant_requests_per_minute,
  tenant.tokens_per_minute as tenant_tokens_per_minute,
  tenant.concurrent_requests as tenant_concurrent_requests,
  billing = 'prepaid' or tenant.monthly_budget_nano_usd is not null
    or api_key.monthly_budget_nano_usd is not null as bounded
from api_key join tenant using (tenant_id)
"""
_FIND_KEY = (
    _KEYS.format(replaced="secret_hash <> $1", noted_s=KEY_USE_NOTED_S)
    + "where secret_hash = $1 or previous_hash = $1"
)
_FIND_KEY_BY_ID = _KEYS.format(replaced="false", noted_s=KEY_USE_NOTED_S) + "where key_id = $1"
# Never waits: whoever has the row is changing the key, or notes the same.
_NOTE_USE = """
update api_key set last_used_at = now()
where key_id = (select key_id from api_key where key_id = $1 for no key update skip locked)
"""


@dataclass(frozen=True, slots=True)
class Principal:
    """A valid key; `expires_at` in Unix seconds. `limits` are the key's, None when it has none, and its tenant's.

    It is `bounded` if credit or a budget bounds what it may use.
    """

    tenant_id: str
    key_id: str
    scopes: frozenset[str]
    expires_at: float | None
    limits: Limits | None = None
    tenant_limits: Limits | None = None
    bounded: bool = False


@dataclass(slots=True)
class _Entry:
    """What Postgres said of a hash; None when there is no valid key of it. Times of a steady clock."""

    principal: Principal | None
    checked_at: float
    fresh_until: float


class KeyCache:
    """Looks keys up in Postgres, remembering the answers, no's too, for a short while in a bounded LRU.

    What is remembered is found by the SHA-256 of the key; the key itself is nowhere kept beyond its request. An answer
    is dropped as soon as a gateway says that the key or its tenant has changed; after NATS was away, when that may have
    gone unheard, all of them are asked for anew.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: Lru[bytes, _Entry] = Lru(KEY_CACHE_ENTRIES_MAX)
        self._asking: dict[bytes, asyncio.Future[_Entry | None]] = {}
        self._changes = 0
        """How often anything was said to have changed: an answer asked for before that may be old."""

    def find_cached(
        self, authorization: str | None, api_key: str | None = None
    ) -> Principal | None:
        """The principal of a request's headers, if that is known without asking; takes microseconds.

        Raises:
            UnauthenticatedError: the key is missing, or known to be none, expired or revoked.
        """
        secret = _secret(authorization, api_key)
        entry = self._entries.use(hash_secret(secret))
        if entry is None or time.monotonic() >= entry.fresh_until:
            return None
        return _checked(entry.principal)

    async def authenticate(
        self, authorization: str | None, api_key: str | None = None
    ) -> Principal:
        """The principal of an `Authorization: Bearer` or, as Anthropic's clients send it, an `x-api-key` header.

        Raises:
            UnauthenticatedError: the key is missing, unknown, expired or revoked.
            UnavailableError: Postgres is away and the key was not seen lately.
        """
        principal = self.find_cached(authorization, api_key)
        if principal is not None:
            return principal
        return _checked(await self._find(hash_secret(_secret(authorization, api_key))))

    def forget(self, change: AccountChanged) -> None:
        """Drops a key, or all keys of a tenant, so that what has changed is seen with the next request."""
        self._changes += 1
        dropped = [
            secret_hash
            for secret_hash, entry in self._entries.items()
            if entry.principal is not None
            and (
                entry.principal.key_id == change.key_id
                or entry.principal.tenant_id == change.tenant_id
            )
        ]
        for secret_hash in dropped:
            del self._entries[secret_hash]

    def distrust(self) -> None:
        """Asks for everything anew when it is next needed; until then it only counts while Postgres is away."""
        self._changes += 1
        for entry in self._entries.values():
            entry.fresh_until = 0.0

    async def hear(self, message: Msg) -> None:
        """Takes in what a gateway says has changed."""
        try:
            self.forget(msgspec.msgpack.decode(message.data, type=AccountChanged))
        except msgspec.DecodeError:
            logger.warning("unreadable message about a key or tenant")
            self.distrust()

    async def _find(self, secret_hash: bytes) -> Principal | None:
        """One question to Postgres at a time for each key; those who come meanwhile wait for its answer."""
        while (asking := self._asking.get(secret_hash)) is not None:
            try:
                return self._known(await asyncio.shield(asking))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not asking.cancelled() or (task is not None and task.cancelling()):
                    raise
                # Only the one who asked has gone: the next one asks.
        asking = asyncio.get_running_loop().create_future()
        self._asking[secret_hash] = asking
        try:
            answer = await self._ask(secret_hash)
            asking.set_result(answer)
        finally:
            asking.cancel()
            del self._asking[secret_hash]
        return self._known(answer)

    async def _ask(self, secret_hash: bytes) -> _Entry | None:
        """The answer of Postgres, or while it is away an earlier one if it is not too old."""
        changes = self._changes
        try:
            row = await self._database.fetchrow(_FIND_KEY, secret_hash)
        except POSTGRES_AWAY:
            entry = self._entries.get(secret_hash)
            now = time.monotonic()
            if entry is None or now - entry.checked_at >= KEY_CACHE_STALE_MAX_S:
                return None
            entry.fresh_until = now + KEY_RETRY_S
            return entry
        if row is not None and row["unnoted"]:
            await self._note_use(row["key_id"])
        now = time.monotonic()
        fresh_s = KEY_CACHE_FRESH_S if changes == self._changes else 0.0
        entry = _Entry(_principal(row) if row else None, now, now + fresh_s)
        self._entries.put(secret_hash, entry)
        return entry

    async def _note_use(self, key_id: str) -> None:
        """Writes down that a key was used; where Postgres takes no writes, keys work all the same."""
        try:
            await self._database.execute(_NOTE_USE, key_id)
        except POSTGRES_FAILED as error:
            logger.warning("the use of a key is not noted: %s", error)

    @staticmethod
    def _known(entry: _Entry | None) -> Principal | None:
        if entry is None:
            raise UnavailableError("keys cannot be checked at the moment; try again")
        return entry.principal


async def principal_of_key(database: Database, key_id: str) -> Principal:
    """Who a key is, by its id: for work that goes on in its name when no request carries it.

    Raises:
        UnauthenticatedError: it is revoked or has expired.
    """
    row = await database.fetchrow(_FIND_KEY_BY_ID, key_id)
    return _checked(_principal(row) if row else None)


def hash_secret(secret: str) -> bytes:
    """What is stored of a key.

    It is the same for `rv-…` and `tml-…`: Tinker's SDK refuses keys that do not begin with its own prefix, so that
    every key may be written either way, and is one key with one set of limits.
    """
    if secret.startswith(TINKER_PREFIX):
        secret = KEY_PREFIX + secret.removeprefix(TINKER_PREFIX)
    return hashlib.sha256(secret.encode()).digest()


def _secret(authorization: str | None, api_key: str | None) -> str:
    """The key that a request's headers carry."""
    if authorization is None:
        secret = (api_key or "").strip()
    elif authorization.startswith("Bearer "):
        secret = authorization[7:].strip()
    else:
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
    if not secret:
        raise UnauthenticatedError(
            "no API key: send `Authorization: Bearer <key>` or `x-api-key: <key>`"
        )
    if len(secret) > KEY_MAX_CHARS or not secret.startswith((KEY_PREFIX, TINKER_PREFIX)):
        raise UnauthenticatedError("the API key is not valid")
    return secret


def _checked(principal: Principal | None) -> Principal:
    if principal is None:
        raise UnauthenticatedError("the API key is not valid")
    if principal.expires_at is not None and principal.expires_at <= time.time():
        raise UnauthenticatedError("the API key has expired")
    return principal


def _principal(row: Row) -> Principal | None:
    if row["revoked_at"] is not None:
        return None
    expires_at = cast("dt.datetime | None", row["expires_at"])
    return Principal(
        tenant_id=row["tenant_id"],
        key_id=row["key_id"],
        scopes=frozenset(row["scopes"]),
        expires_at=expires_at.timestamp() if expires_at else None,
        limits=limits_of(row),
        tenant_limits=limits_of(row, "tenant_"),
        bounded=row["bounded"],
    )


def limits_of(row: Row, prefix: str = "") -> Limits | None:
    """The limits in the columns of a row; None when there are none."""
    limits = Limits(
        requests_per_minute=row[f"{prefix}requests_per_minute"],
        tokens_per_minute=row[f"{prefix}tokens_per_minute"],
        concurrent_requests=row[f"{prefix}concurrent_requests"],
    )
    return None if limits == Limits() else limits


def credentials(scope: Scope) -> tuple[str | None, str | None]:
    """The headers `authorization` and `x-api-key` of a request."""
    authorization = api_key = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            authorization = value.decode("latin-1")
        elif name == b"x-api-key":
            api_key = value.decode("latin-1")
    return authorization, api_key


def requires(
    *scopes: str,
) -> Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]:
    """A Litestar guard: the request needs a valid key with at least one of `scopes`."""
    assert scopes
    assert set(scopes) <= set(SCOPES)

    async def guard(
        connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler
    ) -> None:
        keys = cast("KeyCache", connection.app.state.services.keys)
        principal = await keys.authenticate(*credentials(connection.scope))
        context_of(connection.scope).tenant_id = principal.tenant_id
        check_scopes(principal, scopes)
        connection.scope["state"][_PRINCIPAL] = principal

    return guard


def check_scopes(principal: Principal, scopes: Sequence[str]) -> None:
    """Raises PermissionDeniedError unless the key has one of `scopes`."""
    if principal.scopes.isdisjoint(scopes):
        needed = " or ".join(f"`{scope}`" for scope in scopes)
        raise PermissionDeniedError(f"the API key lacks the scope {needed}")


def principal_of(request: Request[Any, Any, Any]) -> Principal:
    """The principal of a request that passed a guard."""
    return cast("Principal", request.scope["state"][_PRINCIPAL])
