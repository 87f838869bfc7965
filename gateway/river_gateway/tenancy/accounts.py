"""Tenants and keys in Postgres: made, listed, changed and ended, of which the gateways are told (`announce`)."""

from __future__ import annotations

import datetime as dt
import logging
import secrets
from typing import TYPE_CHECKING, cast

import msgspec

from river_client import feedback_wire
from river_client.wire import ApiKey, ChangeKey, ChangeLimits, Limits, Tenant
from river_gateway.bus import BusError
from river_gateway.database import NameTakenError
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.ids import new_id
from river_gateway.limits import (
    COMPLETIONS_KEPT_MAX_S,
    KEY_GRACE_MAX_S,
    LIMIT_MAX,
    NAME_MAX_CHARS,
    PAGE_ROWS_MAX,
)
from river_gateway.tenancy.auth import KEY_PREFIX, SCOPES, hash_secret, limits_of
from river_gateway.tenancy.messages import ACCOUNTS_SUBJECT, AccountChanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_gateway.database import Database, Row
    from river_gateway.services import Services

logger = logging.getLogger("river.gateway")

_SECRET_BYTES = 32
_SHOWN_CHARS = 10

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
_INSERT_TENANT = """
insert into tenant (tenant_id, name, requests_per_minute, tokens_per_minute, concurrent_requests)
values ($1, $2, $3, $4, $5) returning *
"""
_LIST_TENANTS = "select * from tenant order by created_at, tenant_id limit $1"
_FIND_TENANT = "select tenant_id from tenant where tenant_id = $1 or name = $1"
_GET_TENANT = "select * from tenant where tenant_id = $1 or name = $1"
_GET_KEY = "select * from api_key where key_id = $1"
_INSERT_KEY = """
insert into api_key (
  key_id, tenant_id, name, secret_hash, prefix, scopes, expires_at,
  requests_per_minute, tokens_per_minute, concurrent_requests
)
values ($1, $2, $3, $4, $5, $6::text[], $7, $8, $9, $10) returning *
"""
_LIST_KEYS = """
select * from api_key where $1::text is null or tenant_id = $1 order by created_at, key_id limit $2
"""
_REVOKE_KEY = """
update api_key set revoked_at = coalesce(revoked_at, now()) where key_id = $1 returning *
"""
# Of the secrets before, the last one alone goes on. A request that is sent again replaces the secret whose answer was
# lost: what goes on is then still what was in use before.
_ROTATE_KEY = """
update api_key set
  secret_hash = $2, prefix = $3, rotated_at = now(), rotation_key = $5,
  previous_hash = case when rotation_key = $5 then previous_hash when $4 > 0 then secret_hash end,
  previous_until = case
    when rotation_key = $5 then previous_until when $4 > 0 then now() + make_interval(secs => $4::integer)
  end
where key_id = $1 and revoked_at is null returning *
"""
_CHANGE_KEY = """
update api_key set
  name = case when $2 then $3 else name end,
  scopes = case when $4 then $5::text[] else scopes end,
  expires_at = case when $6 then $7 else expires_at end
where key_id = $1 returning *
"""
_CHANGED_LIMITS = """
  requests_per_minute = case when $2 then $3 else requests_per_minute end,
  tokens_per_minute = case when $4 then $5 else tokens_per_minute end,
  concurrent_requests = case when $6 then $7 else concurrent_requests end
"""
_LIMIT_KEY = f"update api_key set {_CHANGED_LIMITS} where key_id = $1 returning *"  # noqa: S608 - constants
_CHANGE_TENANT = f"""
update tenant set {_CHANGED_LIMITS} where tenant_id = $1 or name = $1 returning *
"""  # noqa: S608 - constants
_RETAIN = """
update tenant set completions_kept_s = case when $2 then $3 else completions_kept_s end
where tenant_id = $1 or name = $1 returning *
"""


async def announce(services: Services, change: AccountChanged) -> None:
    """Makes every gateway forget what it knows of a key or tenant, this one at once.

    If NATS is away, the others do so when it is back.
    """
    services.keys.forget(change)
    try:
        await services.bus.tell(ACCOUNTS_SUBJECT, msgspec.msgpack.encode(change))
    except BusError as error:
        logger.warning("a change of %s is not announced: %s", change, error)


async def create_tenant(database: Database, name: str, limits: Limits | None = None) -> Tenant:
    """A new tenant.

    Raises:
        InvalidFieldError: the name is empty or too long, or a limit is out of range.
        ConflictError: the name is taken.
    """
    _check_name(name, "name")
    try:
        row = await database.fetchrow(_INSERT_TENANT, new_id("ten"), name, *_columns(limits))
    except NameTakenError:
        raise ConflictError(f"there is a tenant named {name!r} already", param="name") from None
    assert row is not None
    return _tenant(row)


async def list_tenants(database: Database) -> list[Tenant]:
    """All tenants, oldest first."""
    return [_tenant(row) for row in await database.fetch(_LIST_TENANTS, PAGE_ROWS_MAX)]


async def find_tenant(database: Database, tenant: str) -> str:
    """The id of a tenant, given by id or name.

    Raises:
        NotFoundError: there is no such tenant.
    """
    tenant_id = await database.fetchval(_FIND_TENANT, tenant)
    if tenant_id is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    return cast("str", tenant_id)


async def get_tenant(database: Database, tenant: str) -> Tenant:
    """A tenant, given by id or name.

    Raises:
        NotFoundError: there is no such tenant.
    """
    row = await database.fetchrow(_GET_TENANT, tenant)
    if row is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    return _tenant(row)


async def create_key(
    database: Database,
    *,
    tenant: str,
    name: str = "default",
    scopes: Sequence[str] = ("infer", "train"),
    expires_at: str | None = None,
    limits: Limits | None = None,
) -> ApiKey:
    """A new key of a tenant, given by id or name; the only answer that ever has `secret`.

    Raises:
        NotFoundError: there is no such tenant.
        InvalidFieldError: a scope is unknown, a limit is out of range, or `expires_at` is no ISO 8601 time with an
            offset.
    """
    _check_name(name, "name")
    _check_scopes(scopes)
    expires = parse_time(expires_at, "expires_at") if expires_at is not None else None
    tenant_id = await find_tenant(database, tenant)
    secret = _new_secret()
    row = await database.fetchrow(
        _INSERT_KEY,
        new_id("key"),
        tenant_id,
        name,
        hash_secret(secret),
        secret[:_SHOWN_CHARS],
        sorted(set(scopes)),
        expires,
        *_columns(limits),
    )
    assert row is not None
    return _api_key(row, secret=secret)


async def list_keys(database: Database, tenant: str | None) -> list[ApiKey]:
    """The keys of one tenant, given by id or name, or of all, oldest first, without their secrets."""
    tenant_id = await find_tenant(database, tenant) if tenant is not None else None
    return [_api_key(row) for row in await database.fetch(_LIST_KEYS, tenant_id, PAGE_ROWS_MAX)]


async def get_key(database: Database, key_id: str) -> ApiKey:
    """A key, without its secrets.

    Raises:
        NotFoundError: there is no such key.
    """
    row = await database.fetchrow(_GET_KEY, key_id)
    if row is None:
        raise _no_key(key_id)
    return _api_key(row)


async def revoke_key(database: Database, key_id: str) -> ApiKey:
    """Ends a key, with both of its secrets; doing it again changes nothing.

    Raises:
        NotFoundError: there is no such key.
    """
    row = await database.fetchrow(_REVOKE_KEY, key_id)
    if row is None:
        raise _no_key(key_id)
    return _api_key(row)


async def rotate_key(
    database: Database, key_id: str, grace_s: int, *, identity: str | None = None
) -> ApiKey:
    """Gives a key a new secret, which the answer has; for `grace_s` the one before goes on, and no other.

    It stays one key: limits, budget and usage are of both secrets together. The same `identity` again is the same
    rotation with another secret.

    Raises:
        NotFoundError: there is no such key, or it is revoked.
        InvalidFieldError: the grace period is none.
    """
    if not 0 <= grace_s <= KEY_GRACE_MAX_S:
        raise InvalidFieldError(
            f"grace_s: {grace_s}, must be 0 to {KEY_GRACE_MAX_S}", param="grace_s"
        )
    secret = _new_secret()
    row = await database.fetchrow(
        _ROTATE_KEY, key_id, hash_secret(secret), secret[:_SHOWN_CHARS], grace_s, identity
    )
    if row is None:
        raise NotFoundError(f"there is no key {key_id!r} that is not revoked", param="key_id")
    return _api_key(row, secret=secret)


async def change_key(database: Database, key_id: str, change: ChangeKey) -> ApiKey:
    """Changes what is given of a key's name, scopes and expiry; None ends an expiry.

    Raises:
        NotFoundError: there is no such key.
        InvalidFieldError: a name, scope or time is none.
    """
    name = None if change.name is msgspec.UNSET else change.name
    scopes = None if change.scopes is msgspec.UNSET else change.scopes
    expires = None if change.expires_at is msgspec.UNSET else change.expires_at
    if name is not None:
        _check_name(name, "name")
    if scopes is not None:
        _check_scopes(scopes)
    row = await database.fetchrow(
        _CHANGE_KEY,
        key_id,
        name is not None,
        name,
        scopes is not None,
        sorted(set(scopes or ())),
        change.expires_at is not msgspec.UNSET,
        None if expires is None else parse_time(expires, "expires_at"),
    )
    if row is None:
        raise _no_key(key_id)
    return _api_key(row)


async def change_key_limits(database: Database, key_id: str, change: ChangeLimits) -> ApiKey:
    """Changes those limits of a key that are given; None ends one.

    Raises:
        NotFoundError: there is no such key.
        InvalidFieldError: a limit is out of range.
    """
    row = await database.fetchrow(_LIMIT_KEY, key_id, *_changed_columns(change))
    if row is None:
        raise _no_key(key_id)
    return _api_key(row)


async def change_retention(
    database: Database, tenant: str, change: feedback_wire.ChangeRetention
) -> Tenant:
    """Changes for how long the completions of a tenant, given by id or name, are kept from now on.

    Raises:
        InvalidFieldError: it is no possible time.
        NotFoundError: there is no such tenant.
    """
    kept_s, is_set = change.completions_kept_s, change.completions_kept_s is not msgspec.UNSET
    if isinstance(kept_s, int) and not 0 <= kept_s <= COMPLETIONS_KEPT_MAX_S:
        raise InvalidFieldError(
            f"completions_kept_s: {kept_s}, must be 0 to {COMPLETIONS_KEPT_MAX_S}; 0 keeps none, null is the default",
            param="completions_kept_s",
        )
    row = await database.fetchrow(_RETAIN, tenant, is_set, kept_s if is_set else None)
    if row is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    return _tenant(row)


async def change_tenant_limits(database: Database, tenant: str, change: ChangeLimits) -> Tenant:
    """Changes those limits of a tenant, given by id or name, that are given; None ends one.

    Raises:
        NotFoundError: there is no such tenant.
        InvalidFieldError: a limit is out of range.
    """
    row = await database.fetchrow(_CHANGE_TENANT, tenant, *_changed_columns(change))
    if row is None:
        raise NotFoundError(f"there is no tenant {tenant!r}", param="tenant")
    return _tenant(row)


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


def _new_secret() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def _no_key(key_id: str) -> NotFoundError:
    return NotFoundError(f"there is no key {key_id!r}", param="key_id")


def _check_scopes(scopes: Sequence[str]) -> None:
    for index, scope in enumerate(scopes):
        if scope not in SCOPES:
            raise InvalidFieldError(
                f"{scope!r} is not a scope; there are {', '.join(SCOPES)}", param=f"scopes[{index}]"
            )


def _check_name(name: str, param: str) -> None:
    if not 0 < len(name.strip()) <= NAME_MAX_CHARS:
        raise InvalidFieldError(
            f"{param}: {len(name)} characters, must be 1 to {NAME_MAX_CHARS}", param=param
        )


def _columns(limits: Limits | None) -> list[int | None]:
    return [_limit(limits, name) for name in _LIMITS]


def _changed_columns(change: ChangeLimits) -> list[bool | int | None]:
    """Whether and to what each limit changes."""
    columns: list[bool | int | None] = []
    for name in _LIMITS:
        is_set = getattr(change, name) is not msgspec.UNSET
        columns += [is_set, _limit(change, name) if is_set else None]
    return columns


def _limit(limits: Limits | ChangeLimits | None, name: str) -> int | None:
    value = cast("int | None", getattr(limits, name)) if limits is not None else None
    if value is not None and not 0 < value <= LIMIT_MAX:
        raise InvalidFieldError(
            f"limits.{name}: {value}, must be 1 to {LIMIT_MAX}; null is no limit",
            param=f"limits.{name}" if isinstance(limits, Limits) else name,
        )
    return value


def _tenant(row: Row) -> Tenant:
    return Tenant(
        tenant_id=row["tenant_id"],
        name=row["name"],
        created_at=row["created_at"].isoformat(),
        limits=limits_of(row),
        completions_kept_s=row["completions_kept_s"],
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
        rotated_at=iso("rotated_at"),
        previous_until=iso("previous_until"),
        last_used_at=iso("last_used_at"),
        limits=limits_of(row),
        secret=secret,
    )
