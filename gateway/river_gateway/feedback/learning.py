"""Runs that learn, in Postgres: which there are, which gateway works on each, and the batch at hand.

The row is the truth. A batch is claimed for good in the transaction that writes it into the row with the seq of its
operation, and only then submitted. Whoever has the lease submits what the row says: a gateway that takes over does so
again, under the same identity, and so a completion is neither trained on twice nor lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from river_client.feedback_wire import ClaimFeedback
from river_client.learning_wire import LearningState, StartLearning
from river_gateway.errors import ConflictError, NotFoundError
from river_gateway.feedback import rewards
from river_gateway.ids import new_id
from river_gateway.limits import LEARNING_LEASE_S, LEARNINGS_PER_TENANT_MAX, PAGE_ROWS_MAX
from river_trainer.protocol import policy_version

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Sequence

    from river_gateway.database import Database, Pool, Row

_FIND = "select * from learning where run_id = $1 and tenant_id = $2"
_LIST = "select * from learning where tenant_id = $1 order by started_at desc, run_id limit $2"
_COUNT_OTHERS = """
select count(*) from learning where tenant_id = $1 and run_id != $2 and status in ('learning', 'stopping')
"""
# One that has ended makes room for the next.
_START = """
insert into learning (run_id, tenant_id, key_id, alias, settings, status, first_seq, next_seq, step)
values ($1, $2, $3, $4, $5::jsonb, 'learning', $6, $6, $7)
on conflict (run_id) do update set
  key_id = excluded.key_id, alias = excluded.alias, settings = excluded.settings, status = 'learning', reason = null,
  started_at = now(), ended_at = null, first_seq = excluded.first_seq, next_seq = excluded.next_seq,
  steps = 0, completions = 0, step = excluded.step, metrics = '{}', leased_by = null, leased_until = null
where learning.status in ('stopped', 'failed')
returning *
"""
_STOP = """
update learning set
  status = case when batch_id is null then 'stopped' else 'stopping' end,
  ended_at = case when batch_id is null then now() end
where run_id = $1 and tenant_id = $2 and status = 'learning' returning *
"""
_LEASE = """
update learning set leased_by = $1, leased_until = now() + make_interval(secs => $2::double precision)
where run_id in (
  select run_id from learning
  where status in ('learning', 'stopping') and (leased_until is null or leased_until <= now())
  order by leased_until nulls first limit $3 for update skip locked
) returning run_id
"""
_RENEW = """
update learning set leased_until = now() + make_interval(secs => $2::double precision)
where leased_by = $1 and run_id = any($3::text[]) returning run_id
"""
_RELEASE = "update learning set leased_until = now() where leased_by = $1 and leased_until > now()"
_MINE = "run_id = $1 and leased_by = $2 and status in ('learning', 'stopping')"
_LEASED = f"select * from learning where {_MINE}"  # noqa: S608 - built from constants
_LOCK_IDLE = f"{_LEASED} and status = 'learning' and batch_id is null for update"
_TAKE = """
update learning set batch_id = $2, batch_at = now(), next_seq = greatest(next_seq, $3) where run_id = $1 returning *
"""
_SKIP_SEQ = f"update learning set next_seq = $3 + 1 where {_MINE} and next_seq = $3"  # noqa: S608 - built from constants
_SETTLE = f"""
update learning set
  batch_id = null, batch_at = null, completions = completions + $4,
  steps = steps + $5, next_seq = next_seq + $5, step = coalesce($6, step), metrics = coalesce($7::jsonb, metrics),
  status = case status when 'stopping' then 'stopped' else status end,
  ended_at = case status when 'stopping' then now() end
where {_MINE} and batch_id = $3 returning status
"""  # noqa: S608 - built from constants
_FAIL = f"""
update learning set status = 'failed', reason = $3, ended_at = now(), batch_id = null, batch_at = null,
  next_seq = next_seq + $4
where {_MINE} returning run_id
"""  # noqa: S608 - built from constants


@dataclass(frozen=True, slots=True)
class Batch:
    """What is to be submitted as operation `seq`; `claimed_at` tells its message from anybody else's of that seq."""

    batch_id: str
    claimed_at: dt.datetime
    seq: int


@dataclass(frozen=True, slots=True)
class Leased:
    """A row that this gateway works on."""

    run_id: str
    tenant_id: str
    key_id: str
    state: LearningState
    batch: Batch | None


def name_of(run_id: str) -> str:
    """What it is remembered by among the tenant's names, none of which has a space."""
    return f"learning {run_id}"


def next_batch(run_id: str, base_model: str, settings: StartLearning) -> ClaimFeedback:
    """What a run that learns asks for."""
    return ClaimFeedback(
        model=settings.alias,
        consumer=run_id,
        min_batch=settings.min_batch,
        max_batch=settings.max_batch,
        base_model=base_model,
        baseline=settings.baseline,
    )


# ---- For tenants -----------------------------------------------------------------------------------------------------


async def find(database: Database, *, run_id: str, tenant_id: str) -> LearningState | None:
    """What a run learns, or has learnt last."""
    row = await database.fetchrow(_FIND, run_id, tenant_id)
    return None if row is None else state_of(row)


async def get(database: Database, *, run_id: str, tenant_id: str) -> LearningState:
    """The same.

    Raises:
        NotFoundError: it has never learnt from feedback, or is no run of this tenant's.
    """
    found = await find(database, run_id=run_id, tenant_id=tenant_id)
    if found is None:
        raise NotFoundError(f"{run_id!r} has not learnt from feedback", param="run_id")
    return found


async def list_all(database: Database, tenant_id: str) -> list[LearningState]:
    """What the tenant's runs learn and have learnt, newest first."""
    return [state_of(row) for row in await database.fetch(_LIST, tenant_id, PAGE_ROWS_MAX)]


async def start(
    database: Database,
    *,
    run_id: str,
    tenant_id: str,
    key_id: str,
    settings: StartLearning,
    seq: int,
    step: int,
) -> LearningState:
    """Begins; the same again while it goes on is a no-op, so that a repeated request is none too many.

    Raises:
        ConflictError: the run is learning something else, or still stopping.
    """
    wanted = msgspec.json.encode(settings).decode()
    row = await database.fetchrow(
        _START, run_id, tenant_id, key_id, settings.alias, wanted, seq, step
    )
    if row is not None:
        return state_of(row)
    current = await get(database, run_id=run_id, tenant_id=tenant_id)
    check_startable(current, settings)
    return current


def check_startable(current: LearningState | None, settings: StartLearning) -> None:
    """Raises ConflictError if a run is learning something else, or still stopping."""
    if current is None or not current.active:
        return
    if current.status == "stopping":
        raise ConflictError(
            f"{current.run_id} is still stopping to learn from {current.alias!r}; wait until it has",
            param="run_id",
        )
    if current.settings != settings:
        raise ConflictError(
            f"{current.run_id} is learning from {current.alias!r} already, with other settings; stop that first",
            param="run_id",
        )


async def check_room(database: Database, *, run_id: str, tenant_id: str) -> None:
    """Bounds the runs of a tenant that learn at once; of requests at the same time a few more may come through.

    Raises:
        ConflictError: as many others are learning as may.
    """
    others = await database.fetchval(_COUNT_OTHERS, tenant_id, run_id)
    if others >= LEARNINGS_PER_TENANT_MAX:
        raise ConflictError(
            f"{others} other runs are learning, at most {LEARNINGS_PER_TENANT_MAX} of a tenant may; stop one first",
            param="run_id",
        )


async def stop(database: Database, *, run_id: str, tenant_id: str) -> LearningState:
    """Ends it, once the batch at hand has been applied; again is a no-op.

    Raises:
        NotFoundError: it has never learnt from feedback.
    """
    row = await database.fetchrow(_STOP, run_id, tenant_id)
    return await get(database, run_id=run_id, tenant_id=tenant_id) if row is None else state_of(row)


# ---- For the gateway that works on them ------------------------------------------------------------------------------


async def lease(database: Database, gateway_id: str, limit: int) -> list[str]:
    """Up to `limit` runs that nobody works on; for `LEARNING_LEASE_S` they are this gateway's."""
    rows = await database.fetch(_LEASE, gateway_id, LEARNING_LEASE_S, limit)
    return [row["run_id"] for row in rows]


async def renew(database: Database, gateway_id: str, run_ids: list[str]) -> set[str]:
    """Keeps the leases of these runs; those that are still this gateway's."""
    rows = await database.fetch(_RENEW, gateway_id, LEARNING_LEASE_S, run_ids)
    return {row["run_id"] for row in rows}


async def release(database: Database, gateway_id: str) -> None:
    """Leaves everything to others."""
    await database.execute(_RELEASE, gateway_id)


async def leased(database: Database, run_id: str, gateway_id: str) -> Leased | None:
    """A run as it is now; None when it has ended, or has become somebody else's."""
    row = await database.fetchrow(_LEASED, run_id, gateway_id)
    return None if row is None else _leased(row)


async def take_batch(
    pool: Pool, run_id: str, gateway_id: str, asked: ClaimFeedback, seq: int
) -> Leased | None:
    """Claims the next batch for good and makes it the one at hand; None while there is too little, or nothing to do.

    Its operation will be the run's next one, or `seq` where somebody else's have come in between.
    """
    batch_id = new_id("bat")
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(_LOCK_IDLE, run_id, gateway_id)
        if row is None:
            return None
        claimed = await rewards.claim_batch(
            connection, tenant_id=row["tenant_id"], asked=asked, batch_id=batch_id, claim_s=None
        )
        if not claimed:
            return None
        row = await connection.fetchrow(_TAKE, run_id, batch_id, seq)
    assert row is not None
    return _leased(row)


async def skip_seq(database: Database, run_id: str, gateway_id: str, seq: int) -> None:
    """Notes that somebody else's operation has `seq`."""
    await database.execute(_SKIP_SEQ, run_id, gateway_id, seq)


async def settle(
    database: Database,
    run_id: str,
    gateway_id: str,
    batch: Batch,
    *,
    completions: int,
    step: int | None = None,
    metrics: dict[str, float] | None = None,
) -> bool:
    """The batch at hand has been applied, or without a `step` taught nothing; whether that was the last one."""
    stepped = int(step is not None)
    told = None if metrics is None else msgspec.json.encode(metrics).decode()
    status = await database.fetchval(
        _SETTLE, run_id, gateway_id, batch.batch_id, completions, stepped, step, told
    )
    return status == "stopped"


async def fail(
    pool: Pool, work: Leased, gateway_id: str, reason: str, *, submitted: bool, give_back: bool
) -> None:
    """Ends a run's learning. `submitted` is whether the seq at hand is used; the batch may be given back."""
    async with pool.acquire() as connection, connection.transaction():
        mine = await connection.fetchval(_FAIL, work.run_id, gateway_id, reason, int(submitted))
        if mine is not None and give_back and work.batch is not None:
            await rewards.give_back(
                connection, tenant_id=work.tenant_id, batch_id=work.batch.batch_id
            )


async def batch_rows(database: Database, work: Leased) -> Sequence[Row]:
    """What there is of the batch at hand."""
    assert work.batch is not None
    return await rewards.rows_of(database, tenant_id=work.tenant_id, batch_id=work.batch.batch_id)


def _leased(row: Row) -> Leased:
    batch = None
    if row["batch_id"] is not None:
        batch = Batch(row["batch_id"], row["batch_at"], row["next_seq"])
    return Leased(row["run_id"], row["tenant_id"], row["key_id"], state_of(row), batch)


def state_of(row: Row) -> LearningState:
    """A row as clients see it."""
    ended_at: dt.datetime | None = row["ended_at"]
    return LearningState(
        run_id=row["run_id"],
        alias=row["alias"],
        settings=msgspec.json.decode(row["settings"], type=StartLearning),
        status=row["status"],
        steps=row["steps"],
        completions=row["completions"],
        policy_version=policy_version(row["run_id"], row["step"]),
        first_seq=row["first_seq"],
        next_seq=row["next_seq"],
        started_at=row["started_at"].isoformat(),
        metrics=msgspec.json.decode(row["metrics"], type=dict[str, float]),
        reason=row["reason"],
        ended_at=None if ended_at is None else ended_at.isoformat(),
    )
