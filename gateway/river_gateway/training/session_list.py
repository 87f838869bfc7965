"""The tenant's sessions in Postgres as they are listed and looked for: their names, what they hold, how they ended."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from river_gateway.errors import NotFoundError
from river_gateway.limits import SESSION_SILENT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_gateway.database import Database, Row

EndReason = Literal["success", "errored", "interrupted"]
Status = Literal["active", "silent", "success", "errored", "interrupted"]
STATUSES: tuple[Status, ...] = get_args(Status)

# `silent` is one that nobody has ended and whose client is not heard of any more. One that was ended without a reason
# was ended as it should be.
_SESSIONS = f"""
select s.session_id, s.key_id, k.name as key_name, s.tags, s.created_at, s.heartbeat_at, s.display_name,
       s.user_metadata, s.project_id, s.end_detail, held.checkpoints, held.size_bytes,
       case when s.ended_at is not null then coalesce(s.end_reason, 'success')
            when s.heartbeat_at < now() - interval '{SESSION_SILENT_S} seconds' then 'silent'
            else 'active' end as status
from session s join api_key k using (key_id)
cross join lateral (
  select count(*) as checkpoints, coalesce(sum(c.size_bytes), 0)::bigint as size_bytes
  from run r join checkpoint c using (run_id)
  where r.session_id = s.session_id and c.deleted_at is null and (c.expires_at is null or c.expires_at > now())
) held
"""  # noqa: S608 - built from constants
_FIND = f"{_SESSIONS} where s.session_id = $1 and s.tenant_id = $2"
_SEARCH = f"""
select * from ({_SESSIONS} where s.tenant_id = $1
  and ($2::text is null or s.session_id = $2)
  and s.user_metadata @> $3::jsonb
  and ($4::text is null or strpos(lower(s.display_name), lower($4)) > 0)
  and ($5::text[] is null or s.project_id = any($5))
  and ($6::text[] is null or s.key_id = any($6))
  and ($8::timestamptz is null or (s.created_at, s.session_id) < ($8, $9))
) found
where $7::text[] is null or status = any($7)
order by created_at desc, session_id desc offset $10 limit $11
"""  # noqa: S608 - built from constants
_RUNS = "select run_id, model_seq_id from run where session_id = $1 and tenant_id = $2 order by created_at, run_id"
_DESCRIBE_RUN = """
update run set model_seq_id = $3 where run_id = $1 and tenant_id = $2 and model_seq_id is distinct from $3
"""
_FIND_RUN_OF_SESSION = "select run_id from run where session_id = $1 and model_seq_id = $2"
_DESCRIBE = """
update session set display_name = coalesce($3, display_name), user_metadata = coalesce($4::jsonb, user_metadata),
                   project_id = coalesce($5, project_id)
where session_id = $1 and tenant_id = $2 returning session_id
"""
_FINISH = """
update session set end_reason = coalesce(end_reason, $3), end_detail = coalesce(end_detail, $4),
                   ended_at = coalesce(ended_at, now())
where session_id = $1 and tenant_id = $2 returning session_id
"""


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session; `checkpoints` and `size_bytes` are of what its runs have stored at the moment."""

    session_id: str
    key_id: str
    key_name: str
    tags: dict[str, str]
    created_at: dt.datetime
    heartbeat_at: dt.datetime
    display_name: str | None
    user_metadata: dict[str, str]
    project_id: str | None
    status: Status
    end_detail: str | None
    checkpoints: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which sessions are looked for; None is any. `user_metadata` has to be among a session's own."""

    session_id: str | None = None
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None
    project_ids: Sequence[str] | None = None
    key_ids: Sequence[str] | None = None
    statuses: Sequence[Status] | None = None


@dataclass(frozen=True, slots=True)
class After:
    """The last session of a page, after which the next one begins."""

    created_at: dt.datetime
    session_id: str


async def search_sessions(
    database: Database,
    tenant_id: str,
    wanted: Wanted,
    *,
    limit: int,
    offset: int = 0,
    after: After | None = None,
) -> list[SessionRow]:
    """The sessions that are wanted, newest first."""
    rows = await database.fetch(
        _SEARCH,
        tenant_id,
        wanted.session_id,
        _json(wanted.user_metadata or {}),
        wanted.display_name,
        wanted.project_ids,
        wanted.key_ids,
        wanted.statuses,
        after.created_at if after else None,
        after.session_id if after else None,
        offset,
        limit,
    )
    return [_session(row) for row in rows]


async def find_session(database: Database, *, session_id: str, tenant_id: str) -> SessionRow:
    """One session.

    Raises:
        NotFoundError: it is unknown.
    """
    row = await database.fetchrow(_FIND, session_id, tenant_id)
    if row is None:
        raise _unknown(session_id)
    return _session(row)


async def runs_of_session(
    database: Database, *, session_id: str, tenant_id: str
) -> list[tuple[str, int | None]]:
    """Ids of a session's runs, oldest first, with the numbers that their client gave them."""
    rows = await database.fetch(_RUNS, session_id, tenant_id)
    return [(row["run_id"], row["model_seq_id"]) for row in rows]


async def describe_run(
    database: Database, *, run_id: str, tenant_id: str, model_seq_id: int
) -> None:
    """Notes the number that a run's client gave it in its session; again is a no-op."""
    await database.execute(_DESCRIBE_RUN, run_id, tenant_id, model_seq_id)


async def find_run_of_session(
    database: Database, *, session_id: str, model_seq_id: int
) -> str | None:
    """The id of the run that has a number in a session, whoever's it is; to be used for what is shown to all only."""
    return await database.fetchval(_FIND_RUN_OF_SESSION, session_id, model_seq_id)


async def describe_session(
    database: Database,
    *,
    session_id: str,
    tenant_id: str,
    display_name: str | None = None,
    user_metadata: dict[str, str] | None = None,
    project_id: str | None = None,
) -> None:
    """Writes down what a session is called and belongs to; what is None stays as it is.

    Raises:
        NotFoundError: it is unknown.
    """
    metadata = None if user_metadata is None else _json(user_metadata)
    values = (session_id, tenant_id, display_name, metadata, project_id)
    if await database.fetchval(_DESCRIBE, *values) is None:
        raise _unknown(session_id)


async def finish_session(
    database: Database, *, session_id: str, tenant_id: str, reason: EndReason, detail: str | None
) -> None:
    """Ends a session, with why; again changes nothing.

    Raises:
        NotFoundError: it is unknown.
    """
    if await database.fetchval(_FINISH, session_id, tenant_id, reason, detail) is None:
        raise _unknown(session_id)


def _unknown(session_id: str) -> NotFoundError:
    return NotFoundError(f"there is no session {session_id!r}", param="session_id")


def _json(value: dict[str, str]) -> str:
    return msgspec.json.encode(value).decode()


def _session(row: Row) -> SessionRow:
    columns = {name: row[name] for name in SessionRow.__struct_fields__}
    for name in ("tags", "user_metadata"):
        columns[name] = msgspec.json.decode(columns[name], type=dict[str, str])
    return SessionRow(**columns)
