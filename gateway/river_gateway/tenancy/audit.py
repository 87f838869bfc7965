"""The audit log: who changed what, when, through what and in which request. Lines are final: Postgres sees to it.

A line is written in the transaction that does what it says, so that neither is ever there without the other; only what
Postgres has no part in, such as draining an engine, is written down by itself, before it is done.
"""

from __future__ import annotations

import datetime as dt
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from river_client.audit_wire import AuditAction, AuditEntry, AuditThrough
from river_gateway.context import context_of
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import AUDIT_DETAILS_MAX_BYTES
from river_gateway.tenancy.auth import principal_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from litestar import Request

    from river_billing.database import Connection
    from river_gateway.database import Database, Pool, Row
    from river_gateway.tenancy.auth import Principal

READERS = ("train", "admin")
"""The scopes of whom the log is shown: applications that only infer have no need of it."""
_SECRETS = frozenset({"secret", "secret_hash", "authorization", "csrf_token"})
_WRITE = """
insert into audit_log (
  action, through, actor_key_id, actor_key_name, actor_tenant_id, tenant_id, subject, details, request_id
)
values (
  $1, $2, $3, coalesce((select name from api_key where key_id = $3), ''), $4, $5, $6, $7::jsonb, $8
)
"""
_READ = """
select l.*, t.name as tenant_name, a.name as actor_tenant_name
from audit_log l
left join tenant t on t.tenant_id = l.tenant_id
left join tenant a on a.tenant_id = l.actor_tenant_id
where {conditions} order by l.occurred_at desc, l.entry_id desc limit $1
"""
_BEFORE = """
(l.occurred_at, l.entry_id) < (select b.occurred_at, b.entry_id from audit_log b where b.entry_id = {})
"""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: a key of a tenant, by way of what, in which request."""

    key_id: str
    tenant_id: str
    request_id: str
    through: AuditThrough


@dataclass(slots=True)
class Line:
    """What is being done, on a connection whose transaction ends with the line; `about` is called once."""

    connection: Connection
    subject: str | None = None
    tenant_id: str | None = None
    details: object = None

    def about(self, subject: str, *, tenant_id: str | None, details: object = None) -> None:
        """What was changed and whom it concerns (None: everybody), with a struct or mapping that says how."""
        assert self.subject is None
        self.subject, self.tenant_id, self.details = subject, tenant_id, details


def actor(principal: Principal, request_id: str, through: AuditThrough) -> Actor:
    """A key, as the log names it."""
    return Actor(principal.key_id, principal.tenant_id, request_id, through)


def actor_of(request: Request[Any, Any, Any]) -> Actor:
    """The key of a request to the API that passed a guard."""
    return actor(principal_of(request), context_of(request.scope).request_id, "api")


@asynccontextmanager
async def recorded(
    pool: Pool, by: Actor, action: AuditAction, *, one_moment: bool = False
) -> AsyncGenerator[Line]:
    """A transaction for an action, which sees `one_moment` if asked. It and its line are both there or neither is."""
    async with pool.acquire() as connection, connection.transaction():
        if one_moment:
            await connection.execute("set transaction isolation level repeatable read")
        line = Line(connection)
        yield line
        assert line.subject is not None, f"what {action} was about is not said"
        await write(
            connection,
            by,
            action,
            subject=line.subject,
            tenant_id=line.tenant_id,
            details=line.details,
        )


async def write(
    database: Database,
    by: Actor,
    action: AuditAction,
    *,
    subject: str,
    tenant_id: str | None,
    details: object = None,
) -> None:
    """Adds a line, in the transaction of the connection that it is given, if that is in one."""
    await database.execute(
        _WRITE,
        action,
        by.through,
        by.key_id,
        by.tenant_id,
        tenant_id,
        subject,
        _details(details),
        by.request_id,
    )


async def read(
    database: Database,
    tenant_id: str | None,
    *,
    day: dt.date | None = None,
    action: str | None = None,
    before: int | None = None,
    count_max: int,
) -> list[AuditEntry]:
    """Lines that concern one tenant, or (None) all, newest first: of a UTC `day`, and `before` an entry.

    `action` is one such as `keys.create`, or a noun such as `keys` for all of its actions.
    """
    arguments: list[Any] = [count_max]
    conditions = ["true"]

    def where(condition: str, value: object) -> None:
        arguments.append(value)
        conditions.append(condition.format(f"${len(arguments)}"))

    if tenant_id is not None:
        where("l.tenant_id = {}", tenant_id)
    if action is not None:
        where("l.action = {}" if "." in action else "starts_with(l.action, {} || '.')", action)
    if day is not None:
        begin = dt.datetime.combine(day, dt.time(), dt.UTC)
        where("l.occurred_at >= {}", begin)
        where("l.occurred_at < {}", begin + dt.timedelta(days=1))
    if before is not None:
        where(_BEFORE, before)
    # Only what is asked for is in the statement, so that each has the index that suits it.
    statement = _READ.format(conditions=" and ".join(conditions))
    return [_entry(row) for row in await database.fetch(statement, *arguments)]


def parse_day(text: str, param: str = "day") -> dt.date:
    """A day such as `2026-10-31`.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        day = dt.date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.year >= dt.MAXYEAR:
        raise InvalidFieldError(f"{param}: {text!r} is no day such as 2026-10-31", param=param)
    return day


def _details(details: object) -> str:
    """As JSON, without what is a secret or absent; what is too long to keep only says so."""
    plain: object = {} if details is None else msgspec.to_builtins(details)
    assert isinstance(plain, dict), "details have names"
    fields = cast("dict[str, Any]", plain)
    kept = {name: value for name, value in fields.items() if name not in _SECRETS}
    text = msgspec.json.encode(kept)
    if len(text) > AUDIT_DETAILS_MAX_BYTES:
        text = msgspec.json.encode({"left_out_bytes": len(text)})
    return text.decode()


def _entry(row: Row) -> AuditEntry:
    return AuditEntry(
        entry_id=row["entry_id"],
        occurred_at=row["occurred_at"].isoformat(),
        action=row["action"],
        through=row["through"],
        key_id=row["actor_key_id"],
        key_name=row["actor_key_name"],
        key_tenant=row["actor_tenant_id"],
        key_tenant_name=row["actor_tenant_name"],
        tenant=row["tenant_id"],
        tenant_name=row["tenant_name"],
        subject=row["subject"],
        details=msgspec.json.decode(row["details"]),
        request_id=row["request_id"],
    )
