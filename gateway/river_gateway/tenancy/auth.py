"""Who is asking: API keys, their tenants and scopes. Only the SHA-256 of a key is stored or compared."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from river_client.wire import ApiKey, Tenant
from river_gateway.context import context_of
from river_gateway.database import POSTGRES_AWAY, NameTakenError
from river_gateway.errors import (
    ConflictError,
    InvalidFieldError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from river_gateway.ids import new_id
from river_gateway.limits import (
    KEY_CACHE_ENTRIES_MAX,
    KEY_CACHE_FRESH_S,
    KEY_CACHE_STALE_MAX_S,
    KEY_MAX_CHARS,
    NAME_MAX_CHARS,
    PAGE_ROWS_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from litestar import Request
    from litestar.connection import ASGIConnection
    from litestar.handlers import BaseRouteHandler

    from river_gateway.database import Database, Row

logger = logging.getLogger("river.gateway")

KEY_PREFIXES = ("rv-", "tml-")
SCOPES = ("infer", "train", "admin")
_SECRET_BYTES = 32
_SHOWN_CHARS = 10
_PRINCIPAL = "river_principal"

# ---- Authentication --------------------------------------------------------------------------------------------------

_FIND_KEY = """
select key_id, tenant_id, scopes, expires_at, revoked_at from api_key where secret_hash = $1
"""


@dataclass(frozen=True, slots=True)
class Principal:
    """A valid key; `expires_at` in Unix seconds."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]
    expires_at: float | None


class KeyCache:
    """Looks keys up in Postgres, remembering the answers for a short while in a bounded LRU."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: OrderedDict[bytes, tuple[Principal | None, float]] = OrderedDict()

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal of an `Authorization` header.

        Raises:
            UnauthenticatedError: it is missing, unknown, expired or revoked.
            UnavailableError: Postgres is away and the key was not seen lately.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise UnauthenticatedError("no API key: send `Authorization: Bearer <key>`")
        if not secret.startswith(KEY_PREFIXES) or len(secret) > KEY_MAX_CHARS:
            raise UnauthenticatedError("the API key is not valid")
        principal = await self._find(hash_secret(secret))
        if principal is None:
            raise UnauthenticatedError("the API key is not valid")
        if principal.expires_at is not None and principal.expires_at <= time.time():
            raise UnauthenticatedError("the API key has expired")
        return principal

    def forget(self, secret_hash: bytes) -> None:
        """Drops a key, so that its revocation is seen at once here."""
        self._entries.pop(secret_hash, None)

    async def _find(self, secret_hash: bytes) -> Principal | None:
        cached = self._entries.get(secret_hash)
        age_s = time.monotonic() - cached[1] if cached else float("inf")
        if cached and age_s < KEY_CACHE_FRESH_S:
            self._entries.move_to_end(secret_hash)
            return cached[0]
        try:
            row = await self._database.fetchrow(_FIND_KEY, secret_hash)
        except POSTGRES_AWAY as error:
            if cached and age_s < KEY_CACHE_STALE_MAX_S:
                return cached[0]
            raise UnavailableError("keys cannot be checked at the moment; try again") from error
        principal = _principal(row) if row else None
        self._entries[secret_hash] = (principal, time.monotonic())
        self._entries.move_to_end(secret_hash)
        while len(self._entries) > KEY_CACHE_ENTRIES_MAX:
            self._entries.popitem(last=False)
        return principal


def hash_secret(secret: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode()).digest()


def _principal(row: Row) -> Principal | None:
    if row["revoked_at"] is not None:
        return None
    expires_at = cast("dt.datetime | None", row["expires_at"])
    return Principal(
        tenant_id=row["tenant_id"],
        key_id=row["key_id"],
        scopes=frozenset(row["scopes"]),
        expires_at=expires_at.timestamp() if expires_at else None,
    )


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
        principal = await keys.authenticate(connection.headers.get("authorization"))
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


# ---- Tenants and keys ------------------------------------------------------------------------------------------------

_INSERT_TENANT = "insert into tenant (tenant_id, name) values ($1, $2) returning *"
_LIST_TENANTS = "select * from tenant order by created_at, tenant_id limit $1"
_FIND_TENANT = "select tenant_id from tenant where tenant_id = $1 or name = $1"
_INSERT_KEY = """
insert into api_key (key_id, tenant_id, name, secret_hash, prefix, scopes, expires_at)
values ($1, $2, $3, $4, $5, $6::text[], $7) returning *
"""
_LIST_KEYS = """
select * from api_key where $1::text is null or tenant_id = $1 order by created_at, key_id limit $2
"""
_REVOKE_KEY = """
update api_key set revoked_at = coalesce(revoked_at, now()) where key_id = $1 returning secret_hash
"""


async def create_tenant(database: Database, name: str) -> Tenant:
    """A new tenant.

    Raises:
        InvalidFieldError: the name is empty or too long.
        ConflictError: the name is taken.
    """
    _check_name(name, "name")
    try:
        row = await database.fetchrow(_INSERT_TENANT, new_id("ten"), name)
    except NameTakenError:
        raise ConflictError(f"there is a tenant named {name!r} already", param="name") from None
    assert row is not None
    return _tenant(row)


async def list_tenants(database: Database) -> list[Tenant]:
    """All tenants, oldest first."""
    return [_tenant(row) for row in await database.fetch(_LIST_TENANTS, PAGE_ROWS_MAX)]


async def create_key(
    database: Database,
    *,
    tenant: str,
    name: str = "default",
    scopes: Sequence[str] = ("infer", "train"),
    expires_at: str | None = None,
) -> ApiKey:
    """A new key of a tenant, given by id or name; the only answer that ever has `secret`.

    Raises:
        NotFoundError: there is no such tenant.
        InvalidFieldError: a scope is unknown, or `expires_at` is no ISO 8601 time with an offset.
    """
    _check_name(name, "name")
    for index, scope in enumerate(scopes):
        if scope not in SCOPES:
            raise InvalidFieldError(
                f"{scope!r} is not a scope; there are {', '.join(SCOPES)}", param=f"scopes[{index}]"
            )
    expires = parse_time(expires_at, "expires_at") if expires_at is not None else None
    tenant_id = await database.fetchval(_FIND_TENANT, tenant)
    if tenant_id is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    secret = KEY_PREFIXES[0] + secrets.token_urlsafe(_SECRET_BYTES)
    row = await database.fetchrow(
        _INSERT_KEY,
        new_id("key"),
        tenant_id,
        name,
        hash_secret(secret),
        secret[:_SHOWN_CHARS],
        sorted(set(scopes)),
        expires,
    )
    assert row is not None
    return _api_key(row, secret=secret)


async def list_keys(database: Database, tenant: str | None) -> list[ApiKey]:
    """The keys of one tenant, given by id or name, or of all, oldest first, without their secrets."""
    tenant_id = await database.fetchval(_FIND_TENANT, tenant) if tenant is not None else None
    if tenant is not None and tenant_id is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    return [_api_key(row) for row in await database.fetch(_LIST_KEYS, tenant_id, PAGE_ROWS_MAX)]


async def revoke_key(database: Database, key_id: str) -> bytes:
    """Ends a key; doing it again changes nothing. Returns the hash of its secret.

    Raises:
        NotFoundError: there is no such key.
    """
    secret_hash = await database.fetchval(_REVOKE_KEY, key_id)
    if secret_hash is None:
        raise NotFoundError(f"there is no key {key_id!r}")
    return cast("bytes", secret_hash)


def parse_time(text: str, param: str) -> dt.datetime:
    """An ISO 8601 time with its offset.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        time_ = dt.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidFieldError(f"{param}: {text!r} is no ISO 8601 time", param=param) from None
    if time_.tzinfo is None:
        raise InvalidFieldError(f"{param}: {text!r} has no offset from UTC", param=param)
    return time_


def _check_name(name: str, param: str) -> None:
    if not 0 < len(name.strip()) <= NAME_MAX_CHARS:
        raise InvalidFieldError(
            f"{param}: {len(name)} characters, must be 1 to {NAME_MAX_CHARS}", param=param
        )


def _tenant(row: Row) -> Tenant:
    return Tenant(
        tenant_id=row["tenant_id"], name=row["name"], created_at=row["created_at"].isoformat()
    )


def _api_key(row: Row, *, secret: str | None = None) -> ApiKey:
    def iso(column: str) -> str | None:
        value = cast("dt.datetime | None", row[column])
        return value.isoformat() if value else None

    return ApiKey(
        key_id=row["key_id"],
        tenant=row["tenant_id"],
        name=row["name"],
        prefix=row["prefix"],
        scopes=list(row["scopes"]),
        created_at=row["created_at"].isoformat(),
        expires_at=iso("expires_at"),
        revoked_at=iso("revoked_at"),
        secret=secret,
    )
