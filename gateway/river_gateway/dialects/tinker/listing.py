"""Runs and checkpoints as they are listed: pages of them, under the names that clients know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.dialects.tinker import rest_bodies as bodies
from river_gateway.dialects.tinker.ids import EPHEMERAL_PREFIX, name_of, of_river, run_name
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import PAGE_ROWS_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_client import wire
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.database import Database

_TYPES: dict[str, bodies.CheckpointType] = {
    "training": "training",
    "inference": "sampler",
    "external": "external",
}
# What a sampling session has to itself is in no list.
_LISTED = f"""
c.tenant_id = $1 and c.deleted_at is null and (c.expires_at is null or c.expires_at > now())
and not (c.mode = 'inference' and starts_with(c.name, '{EPHEMERAL_PREFIX}'))
"""
_CHECKPOINTS = f"""
select c.checkpoint_id, count(*) over () as total from checkpoint c
where {_LISTED} and ($2::text[] is null or c.run_id = any($2))
order by c.created_at desc, c.checkpoint_id offset $3 limit $4
"""  # noqa: S608 - built from constants
_NEWEST = f"""
select distinct on (c.run_id, c.mode) c.checkpoint_id from checkpoint c
where {_LISTED} and c.run_id = any($2) order by c.run_id, c.mode, c.created_at desc
"""  # noqa: S608 - built from constants
_COUNT_CHECKPOINTS = f"""
select count(*) from checkpoint c where {_LISTED} and ($2::text[] is null or c.run_id = any($2))
"""  # noqa: S608 - built from constants
_RUNS = """
select r.run_id from run r join session s using (session_id)
where r.tenant_id = $1 and ($2::text is null or s.project_id = $2)
order by r.created_at desc, r.run_id offset $3 limit $4
"""
_COUNT_RUNS = """
select count(*) from run r join session s using (session_id)
where r.tenant_id = $1 and ($2::text is null or s.project_id = $2)
"""
_MODELS = "select run_id, session_id, model_seq_id from run where run_id = any($1)"


def checkpoint_of(checkpoint: wire.Checkpoint, model: str) -> bodies.Checkpoint:
    """A checkpoint of the run that clients call `model`."""
    path = of_river(checkpoint.path, model)
    return bodies.Checkpoint(
        checkpoint_id=path.partition(f"{model}/")[2],
        checkpoint_type=_TYPES[checkpoint.mode],
        time=checkpoint.created_at,
        tinker_path=path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=checkpoint.user_metadata,
        expires_at=checkpoint.expires_at,
    )


async def checkpoints(
    database: Database,
    tenant_id: str,
    *,
    run_id: str | None = None,
    offset: int = 0,
    limit: int = PAGE_ROWS_MAX,
) -> tuple[list[bodies.Checkpoint], int]:
    """Checkpoints of a run or of all, newest first, and how many there are without the bounds of the page."""
    runs = None if run_id is None else [run_id]
    rows = await database.fetch(_CHECKPOINTS, tenant_id, runs, offset, limit)
    if not rows:
        return [], await database.fetchval(_COUNT_CHECKPOINTS, tenant_id, runs)
    found = await _named(database, tenant_id, [row["checkpoint_id"] for row in rows])
    return [checkpoint for _, checkpoint in found], rows[0]["total"]


async def _named(
    database: Database, tenant_id: str, checkpoint_ids: Sequence[str]
) -> list[tuple[str, bodies.Checkpoint]]:
    """Checkpoints in the order of their ids, each with its run's."""
    found = await catalog.find_checkpoints(
        database, checkpoint_ids=checkpoint_ids, tenant_id=tenant_id
    )
    run_ids = list({row.checkpoint.run_id for row in found})
    names = {row["run_id"]: run_name(**dict(row)) for row in await database.fetch(_MODELS, run_ids)}
    by_id = {row.checkpoint.checkpoint_id: row.checkpoint for row in found}
    return [
        (found.run_id, checkpoint_of(found, names[found.run_id]))
        for identity in checkpoint_ids
        if (found := by_id.get(identity)) is not None
    ]


async def runs(
    database: Database, tenant_id: str, *, project_id: str | None, offset: int, limit: int
) -> tuple[list[bodies.TrainingRun], int]:
    """A tenant's runs, newest first, and how many there are without the bounds of the page."""
    rows = await database.fetch(_RUNS, tenant_id, project_id, offset, limit)
    total = await database.fetchval(_COUNT_RUNS, tenant_id, project_id)
    run_ids = [row["run_id"] for row in rows]
    found = await catalog.find_runs(database, run_ids=run_ids, tenant_id=tenant_id)
    return await training_runs(database, tenant_id, found), total


async def training_runs(
    database: Database, tenant_id: str, found: Sequence[RunRow]
) -> list[bodies.TrainingRun]:
    """Runs with the newest of their checkpoints."""
    rows = await database.fetch(_NEWEST, tenant_id, [run.run_id for run in found])
    named = await _named(database, tenant_id, [row["checkpoint_id"] for row in rows])
    newest = {(run_id, checkpoint.checkpoint_type): checkpoint for run_id, checkpoint in named}
    return [
        bodies.TrainingRun(
            training_run_id=name_of(run),
            base_model=run.base_model,
            model_owner=tenant_id,
            lora_rank=run.lora.rank,
            last_request_time=run.updated_at,
            corrupted=run.lost is not None,
            user_metadata=run.user_metadata,
            last_checkpoint=newest.get((run.run_id, "training")),
            last_sampler_checkpoint=newest.get((run.run_id, "sampler")),
        )
        for run in found
    ]


def page(offset: int, limit: int, limit_max: int = PAGE_ROWS_MAX) -> tuple[int, int]:
    """The bounds of a page, as they can be had.

    Raises:
        InvalidFieldError: they are out of range.
    """
    if not 0 <= offset < 2**31:
        raise InvalidFieldError(f"offset: {offset}, must be 0 to {2**31 - 1}", param="offset")
    if limit < 1:
        raise InvalidFieldError(f"limit: {limit}, must be 1 at least", param="limit")
    return offset, min(limit, limit_max)
