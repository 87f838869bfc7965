"""Stored completions in Postgres. A client that has seen the end of its completion can count on its being there.

Completions that end at about the same time are written together: the next group gathers while one is on its way. While
Postgres is away they wait here, bounded, and requests go on being answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from river_gateway.database import BAD_VALUES, POSTGRES_FAILED
from river_gateway.errors import NotFoundError, UnavailableError
from river_gateway.limits import (
    STORE_BACKLOG_MAX,
    STORE_BACKLOG_MAX_BYTES,
    STORE_GROUP_MAX,
    STORE_GROUP_MAX_BYTES,
    STORE_RETRY_S,
    SWEEP_COMPLETIONS_BATCH,
    SWEEP_PAUSE_S,
)

if TYPE_CHECKING:
    from river_gateway.database import Database, Row
    from river_gateway.feedback.keeping import Keeper, Tokens
    from river_gateway.inference.models import Target

logger = logging.getLogger("river.gateway")

# JSON text can say NUL, but jsonb cannot hold it.
_NUL, _REPLACEMENT = b"\\u0000", b"\\ufffd"

_INSERT = """
insert into stored_completion
  (completion_id, tenant_id, kind, expires_at, model, base_model, policy_version, asked, answer, metadata, tokens)
select new.completion_id, new.tenant_id, new.kind,
  now() + make_interval(secs => coalesce(t.completions_kept_s, $11::double precision)),
  new.model, new.base_model, new.policy_version, new.asked, new.answer, new.metadata, new.tokens
from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[],
            $7::jsonb[], $8::jsonb[], $9::jsonb[], $10::bytea[])
  as new (completion_id, tenant_id, kind, model, base_model, policy_version, asked, answer, metadata, tokens)
join tenant t using (tenant_id)
where coalesce(t.completions_kept_s, $11::double precision) > 0
on conflict (completion_id) do nothing
"""
_LIVE = "tenant_id = $1 and expires_at > now()"
_ONE = f"{_LIVE} and completion_id = $2 and kind = $3"
_FIND = f"select * from stored_completion where {_ONE}"  # noqa: S608 - built from constants
_LIST = f"""
select * from stored_completion c
where {_LIVE} and kind = $6 and ($2::text is null or model = $2) and metadata @> $3::jsonb
  and ($4::text is null or (created_at, completion_id) {{after}}
       (select a.created_at, a.completion_id from stored_completion a where a.completion_id = $4 and a.tenant_id = $1))
order by created_at {{order}}, completion_id {{order}} limit $5
"""  # noqa: S608 - built from constants
_LISTS = {
    "asc": _LIST.format(after=">", order="asc"),
    "desc": _LIST.format(after="<", order="desc"),
}
_UPDATE = f"""
update stored_completion set metadata = $4::jsonb where {_ONE} returning *
"""  # noqa: S608 - built from constants
_DELETE = """
delete from stored_completion
where tenant_id = $1 and completion_id = $2 and kind = $3 returning 1
"""
# Rows that another gateway is sweeping are its affair.
_SWEEP = """
with due as (
  select completion_id from stored_completion where expires_at <= now()
  limit $1 for update skip locked
), gone as (
  delete from stored_completion using due
  where stored_completion.completion_id = due.completion_id returning 1
)
select count(*) from gone
"""
# What was to be kept longer is not kept longer than its tenant says now; what was to go earlier still does.
_SHORTEN = """
with old as (
  select completion_id from stored_completion
  where tenant_id = $1 and expires_at > greatest(now(), created_at + make_interval(secs => $2::double precision))
  limit $3 for update
), shortened as (
  update stored_completion c
  set expires_at = greatest(now(), c.created_at + make_interval(secs => $2::double precision))
  from old where c.completion_id = old.completion_id returning 1
)
select count(*) from shortened
"""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A completion on its way into Postgres. `asked`, the messages or the prompt, and what follows it are JSON."""

    completion_id: str
    tenant_id: str
    kind: str
    model: str
    base_model: str
    policy_version: str
    asked: str
    answer: str
    metadata: str
    tokens: bytes | None

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        return len(self.asked) + len(self.answer) + len(self.metadata) + len(self.tokens or b"")


def stored(keeper: Keeper, *, tenant_id: str, model: str, target: Target) -> Stored | None:
    """What a keeper has gathered, or None when there was no answer."""
    answer = keeper.answer
    if answer is None:
        return None
    tokens: Tokens | None = keeper.tokens
    return Stored(
        completion_id=answer["id"],
        tenant_id=tenant_id,
        kind=keeper.kind,
        model=model,
        base_model=target.base_model,
        policy_version=target.policy_version,
        asked=_storable(keeper.asked),
        answer=_storable(msgspec.json.encode(answer)),
        metadata=msgspec.json.encode(keeper.metadata).decode(),
        tokens=None if tokens is None else msgspec.msgpack.encode(tokens),
    )


@dataclass(slots=True)
class _Round:
    """Completions that are written together; `settled` when they are, or wait for Postgres."""

    rows: list[Stored] = field(default_factory=list[Stored])
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class CompletionStore:
    """Writes completions in groups."""

    def __init__(self, database: Database, *, kept_s: float) -> None:
        self._database = database
        self._kept_s = kept_s
        self._round = _Round()
        self._wake = asyncio.Event()
        self._backlog: deque[Stored] = deque()
        self._waiting = self._waiting_bytes = 0
        self._failing = False

    def admit(self) -> None:
        """Refuses a request to store what could not be held until it is written.

        Raises:
            UnavailableError: too many completions wait for Postgres.
        """
        if self._waiting >= STORE_BACKLOG_MAX or self._waiting_bytes >= STORE_BACKLOG_MAX_BYTES:
            raise UnavailableError("completions cannot be stored at the moment; try again")

    async def add(self, row: Stored) -> None:
        """Returns once the completion is stored, or waits in memory because Postgres is away."""
        gathering = self._round
        gathering.rows.append(row)
        self._waiting += 1
        self._waiting_bytes += row.size_bytes
        self._wake.set()
        if not self._failing:
            await gathering.settled.wait()

    async def run(self) -> None:
        """Writes what comes, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._failing = not await self.flush()
            if self._failing:
                await asyncio.sleep(STORE_RETRY_S)
                self._wake.set()

    async def flush(self) -> bool:
        """Writes what waits, oldest first; False when Postgres cannot take it now."""
        current, self._round = self._round, _Round()
        self._backlog.extend(current.rows)
        try:
            while self._backlog:
                rows = self._next_group()
                await self._write(rows)
                for _ in rows:
                    self._backlog.popleft()
                self._waiting -= len(rows)
                self._waiting_bytes -= sum(row.size_bytes for row in rows)
        except POSTGRES_FAILED as error:
            logger.warning("%d completions wait to be stored: %r", len(self._backlog), error)
            return False
        finally:
            current.settled.set()
        return True

    def _next_group(self) -> list[Stored]:
        """As many of the oldest as one statement should hold, and at least one."""
        group: list[Stored] = []
        size_bytes = 0
        for row in self._backlog:
            size_bytes += row.size_bytes
            if group and (len(group) == STORE_GROUP_MAX or size_bytes > STORE_GROUP_MAX_BYTES):
                break
            group.append(row)
        return group

    async def _write(self, rows: list[Stored]) -> None:
        """Returns once all are written, or given up because Postgres will never take them."""
        try:
            await self._insert(rows)
        except BAD_VALUES as error:
            if len(rows) == 1:
                ids = {"completion": rows[0].completion_id, "tenant": rows[0].tenant_id}
                logger.error("a completion cannot be stored: %s", error, extra=ids)  # noqa: TRY400 - the trace says no more
                return
            for row in rows:
                await self._write([row])

    async def _insert(self, rows: list[Stored]) -> None:
        columns = [[getattr(row, name) for row in rows] for name in Stored.__struct_fields__]
        await self._database.execute(_INSERT, *columns, self._kept_s)


# ---- Reading ---------------------------------------------------------------------------------------------------------


async def find(database: Database, *, completion_id: str, tenant_id: str, kind: str) -> Row:
    """One stored completion; `kind` is `chat` or `text`.

    Raises:
        NotFoundError: there is none.
    """
    row = await database.fetchrow(_FIND, tenant_id, completion_id, kind)
    if row is None:
        raise no_completion(completion_id)
    return row


async def page(
    database: Database,
    *,
    tenant_id: str,
    kind: str,
    model: str | None,
    metadata: dict[str, str],
    after: str | None,
    order: str,
    limit: int,
) -> list[Row]:
    """Stored completions by age."""
    wanted = msgspec.json.encode(metadata).decode()
    return list(await database.fetch(_LISTS[order], tenant_id, model, wanted, after, limit, kind))


async def set_metadata(
    database: Database, *, completion_id: str, tenant_id: str, kind: str, metadata: dict[str, str]
) -> Row:
    """Replaces the metadata of a completion.

    Raises:
        NotFoundError: there is none.
    """
    wanted = msgspec.json.encode(metadata).decode()
    row = await database.fetchrow(_UPDATE, tenant_id, completion_id, kind, wanted)
    if row is None:
        raise no_completion(completion_id)
    return row


async def delete(database: Database, *, completion_id: str, tenant_id: str, kind: str) -> None:
    """Deletes a completion, and what was thought of it.

    Raises:
        NotFoundError: there is none.
    """
    if await database.fetchval(_DELETE, tenant_id, completion_id, kind) is None:
        raise no_completion(completion_id)


async def shorten(database: Database, *, tenant_id: str, kept_s: float) -> None:
    """Lets a tenant's completions go `kept_s` after they were made, if they would have been kept longer."""
    while await database.fetchval(_SHORTEN, tenant_id, kept_s, SWEEP_COMPLETIONS_BATCH):
        pass  # A batch at a time, so that nobody waits long for a row.


async def sweep_forever(database: Database, *, interval_s: float) -> None:
    """Deletes completions whose time is up: all there are, every `interval_s`."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            while await database.fetchval(_SWEEP, SWEEP_COMPLETIONS_BATCH):  # noqa: ASYNC110 - it is no event
                await asyncio.sleep(SWEEP_PAUSE_S)
        except POSTGRES_FAILED as error:
            logger.warning("stored completions were not swept: %r", error)


def no_completion(completion_id: str, param: str = "completion_id") -> NotFoundError:
    """There is no such completion of this tenant's."""
    return NotFoundError(f"there is no stored completion {completion_id!r}", param=param)


def answer_of(row: Row) -> dict[str, Any]:
    """A stored completion as OpenAI shows one, a text with its prompt, which has no route of its own."""
    answer = msgspec.json.decode(row["answer"], type=dict[str, Any])
    answer |= {"metadata": msgspec.json.decode(row["metadata"])}
    return (
        answer if row["kind"] == "chat" else answer | {"prompt": msgspec.json.decode(row["asked"])}
    )


def _storable(text: bytes) -> str:
    return text.replace(_NUL, _REPLACEMENT).decode()
