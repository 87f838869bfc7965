"""The tenant's things in Postgres: sessions, runs, checkpoints. Every query carries the tenant."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from river_client import wire
from river_gateway.errors import NotFoundError
from river_gateway.limits import PAGE_ROWS_MAX
from river_trainer.protocol import policy_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_billing.events import CheckpointSaved
    from river_gateway.database import Database, Row

SCHEME = "river://"
_FOLDERS = {
    "weights": "training",
    "sampler_weights": "inference",
    "external_weights": "external",
}
_MODES = {mode: folder for folder, mode in _FOLDERS.items()}

# ---- Paths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Path:
    """`river://<run>`, the live version of a run, or `river://<run>/<folder>/<name>`, a checkpoint."""

    run_id: str
    mode: str | None = None
    name: str | None = None


def parse_path(text: str) -> Path | None:
    """The parts of a path, or None when `text` is none."""
    if not text.startswith(SCHEME):
        return None
    parts = text.removeprefix(SCHEME).split("/")
    if not all(parts):
        return None
    match parts:
        case [run_id]:
            return Path(run_id)
        case [run_id, folder, name] if folder in _FOLDERS:
            return Path(run_id, _FOLDERS[folder], name)
        case _:
            return None


def checkpoint_path(run_id: str, mode: str, name: str) -> str:
    """The path of a checkpoint."""
    return f"{SCHEME}{run_id}/{_MODES[mode]}/{name}"


# ---- Sessions --------------------------------------------------------------------------------------------------------

_INSERT_SESSION = """
insert into session (session_id, tenant_id, key_id, tags) values ($1, $2, $3, $4::jsonb)
on conflict (session_id) do nothing
"""
_OPEN_SESSION = """
select session_id from session where session_id = $1 and tenant_id = $2 and ended_at is null
"""
_BEAT_SESSION = """
update session set heartbeat_at = now()
where session_id = $1 and tenant_id = $2 and ended_at is null returning session_id
"""
_END_SESSION = """
update session set ended_at = coalesce(ended_at, now())
where session_id = $1 and tenant_id = $2 returning session_id
"""


async def insert_session(
    database: Database, *, session_id: str, tenant_id: str, key_id: str, tags: dict[str, str]
) -> None:
    """Opens a session; again is a no-op."""
    await database.execute(_INSERT_SESSION, session_id, tenant_id, key_id, _json(tags))


async def check_open_session(database: Database, *, session_id: str, tenant_id: str) -> None:
    """Makes sure that a session is open.

    Raises:
        NotFoundError: it is unknown or has ended.
    """
    if await database.fetchval(_OPEN_SESSION, session_id, tenant_id) is None:
        raise NotFoundError(f"there is no open session {session_id!r}", param="session_id")


async def beat_session(database: Database, *, session_id: str, tenant_id: str) -> None:
    """Notes that the client of an open session is alive."""
    if await database.fetchval(_BEAT_SESSION, session_id, tenant_id) is None:
        raise NotFoundError(f"there is no open session {session_id!r}", param="session_id")


async def end_session(database: Database, *, session_id: str, tenant_id: str) -> None:
    """Ends a session; again is a no-op."""
    if await database.fetchval(_END_SESSION, session_id, tenant_id) is None:
        raise NotFoundError(f"there is no session {session_id!r}", param="session_id")


# ---- Runs ------------------------------------------------------------------------------------------------------------

_RUN_COLUMNS = """
select r.run_id, r.session_id, r.base_model, r.lora, r.context_length, r.created_at, r.last_seq,
       r.step, r.metrics, r.imported, r.lost, s.tags, r.user_metadata, r.model_seq_id, r.updated_at
from run r join session s using (session_id)
"""
_INSERT_RUN = """
insert into run (run_id, tenant_id, session_id, base_model, lora, context_length, imported, user_metadata, model_seq_id)
values ($1, $2, $3, $4, $5::jsonb, $6, $7, $8::jsonb, $9) on conflict (run_id) do nothing returning run_id
"""
_DELETE_UNSTARTED_RUN = "delete from run where run_id = $1 and last_seq < 0"
_FIND_RUN = _RUN_COLUMNS + "where r.run_id = $1 and r.tenant_id = $2"
_FIND_RUNS = (
    _RUN_COLUMNS
    + "where r.run_id = any($1) and r.tenant_id = $2 order by r.created_at desc, r.run_id"
)
_LIST_RUNS = (
    _RUN_COLUMNS
    + "where r.tenant_id = $1 and not r.imported order by r.created_at desc, r.run_id limit $2"
)
_INSERT_METRICS = """
insert into run_metric (run_id, step, metrics)
select run_id, coalesce($3::bigint, step), $4::jsonb from run where run_id = $1 and tenant_id = $2
returning run_id
"""


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """A run as stored; `context_length` is the price tier and the limit of its sequences.

    `last_seq` is the newest operation whose result is written down, which lags a little behind; -1 is none yet. One
    that was `imported` is an adapter made elsewhere: it has a checkpoint and takes no operations. `model_seq_id` is the
    number that its client gave it in its session, if it did.
    """

    run_id: str
    session_id: str
    base_model: str
    lora: wire.LoraConfig
    context_length: int
    created_at: str
    last_seq: int
    step: int
    metrics: dict[str, float]
    imported: bool
    lost: str | None
    tags: dict[str, str]
    user_metadata: dict[str, str]
    model_seq_id: int | None
    updated_at: str

    def to_wire(self) -> wire.Run:
        """The run as clients see it."""
        return wire.Run(
            run_id=self.run_id,
            session_id=self.session_id,
            base_model=self.base_model,
            lora=self.lora,
            step=self.step,
            created_at=self.created_at,
            tags=self.tags,
            metrics=self.metrics,
            lost=self.lost,
            user_metadata=self.user_metadata,
        )


async def insert_run(
    database: Database,
    *,
    run_id: str,
    tenant_id: str,
    session_id: str,
    base_model: str,
    lora: wire.LoraConfig,
    context_length: int,
    imported: bool = False,
    user_metadata: dict[str, str] | None = None,
    model_seq_id: int | None = None,
) -> bool:
    """Writes a new run down; False when it is there already."""
    inserted = await database.fetchval(
        _INSERT_RUN,
        run_id,
        tenant_id,
        session_id,
        base_model,
        _json(lora),
        context_length,
        imported,
        _json(user_metadata or {}),
        model_seq_id,
    )
    return inserted is not None


async def delete_unstarted_run(database: Database, run_id: str) -> None:
    """Takes back a run whose creation never reached the trainer."""
    await database.execute(_DELETE_UNSTARTED_RUN, run_id)


async def find_run(database: Database, *, run_id: str, tenant_id: str) -> RunRow:
    """One run.

    Raises:
        NotFoundError: it is unknown.
    """
    row = await database.fetchrow(_FIND_RUN, run_id, tenant_id)
    if row is None:
        raise NotFoundError(f"there is no run {run_id!r}", param="run_id")
    return _run(row)


async def find_runs(database: Database, *, run_ids: Sequence[str], tenant_id: str) -> list[RunRow]:
    """Those of these runs that there are, newest first."""
    return [_run(row) for row in await database.fetch(_FIND_RUNS, run_ids, tenant_id)]


async def list_runs(database: Database, tenant_id: str) -> list[RunRow]:
    """The newest runs, newest first."""
    return [_run(row) for row in await database.fetch(_LIST_RUNS, tenant_id, PAGE_ROWS_MAX)]


async def insert_metrics(
    database: Database, *, run_id: str, tenant_id: str, step: int | None, metrics: dict[str, float]
) -> None:
    """Logs a user's own metrics at `step`, or at the run's step."""
    if (await database.fetchval(_INSERT_METRICS, run_id, tenant_id, step, _json(metrics))) is None:
        raise NotFoundError(f"there is no run {run_id!r}", param="run_id")


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

_LIVE = "deleted_at is null and (expires_at is null or expires_at > now())"
_FIND_CHECKPOINT = f"""
select * from checkpoint
where run_id = $1 and mode = $2 and name = $3 and tenant_id = $4 and {_LIVE}
"""  # noqa: S608 - built from constants
_FIND_READABLE_CHECKPOINT = f"""
select * from checkpoint
where run_id = $1 and mode = $2 and name = $3 and (tenant_id = $4 or public) and {_LIVE}
"""  # noqa: S608 - built from constants
_FIND_CHECKPOINT_OF_STEP = f"""
select * from checkpoint where run_id = $1 and step = $2 and tenant_id = $3 and mode <> 'external' and {_LIVE}
order by created_at desc limit 1
"""  # noqa: S608 - built from constants
_FIND_CHECKPOINTS = (
    f"select * from checkpoint where checkpoint_id = any($1) and tenant_id = $2 and {_LIVE}"  # noqa: S608
)
_LIST_CHECKPOINTS = f"""
select * from checkpoint where tenant_id = $1 and {_LIVE}
order by created_at desc, checkpoint_id limit $2
"""  # noqa: S608 - built from constants
_SET_EXPIRY = f"""
update checkpoint set expires_at = now() + make_interval(secs => $5::double precision)
where run_id = $1 and mode = $2 and name = $3 and tenant_id = $4 and {_LIVE} returning *
"""  # noqa: S608 - built from constants
# The newest of a path, live or not.
_DELETE_CHECKPOINT = """
update checkpoint set deleted_at = coalesce(deleted_at, now())
where checkpoint_id = (
  select checkpoint_id from checkpoint
  where run_id = $1 and mode = $2 and name = $3 and tenant_id = $4
  order by deleted_at is null desc, created_at desc limit 1
)
returning checkpoint_id, location, files_removed_at
"""
# Whether files belong to a live checkpoint as well, of which this is a copy or the other way round.
_IS_SHARED = (
    f"select 1 from checkpoint where location = $1 and files_removed_at is null and {_LIVE} limit 1"  # noqa: S608
)
_ENDED_CHECKPOINTS = f"""
select checkpoint_id, location from checkpoint ended
where files_removed_at is null and least(deleted_at, expires_at) <= now() - make_interval(secs => $2)
  and starts_with(location, $1)
  and not exists (
    select from checkpoint where location = ended.location and files_removed_at is null and {_LIVE}
  )
order by least(deleted_at, expires_at) limit $3
"""  # noqa: S608 - built from constants
_MARK_FILES_REMOVED = """
update checkpoint set files_removed_at = now() where checkpoint_id = $1 and files_removed_at is null
"""


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """A stored checkpoint; `location` is the directory URL of its files, `tenant_id` says whose it is."""

    location: str
    tenant_id: str
    checkpoint: wire.Checkpoint

    @property
    def has_expired(self) -> bool:
        """Whether its time is up by now."""
        expires_at = self.checkpoint.expires_at
        return expires_at is not None and dt.datetime.fromisoformat(expires_at) <= dt.datetime.now(
            dt.UTC
        )


def saved_checkpoint(saved: CheckpointSaved) -> wire.Checkpoint:
    """A checkpoint as its event describes it."""

    def iso(unix_time_s: float) -> str:
        return dt.datetime.fromtimestamp(unix_time_s, dt.UTC).isoformat()

    return wire.Checkpoint(
        checkpoint_id=saved.checkpoint_id,
        path=checkpoint_path(saved.run_id, saved.mode, saved.name),
        run_id=saved.run_id,
        mode=cast("wire.SaveMode", saved.mode),
        name=saved.name,
        base_model=saved.base_model,
        policy_version=policy_version(saved.run_id, saved.step),
        size_bytes=saved.size_bytes,
        created_at=iso(saved.created_at),
        expires_at=iso(saved.expires_at) if saved.expires_at is not None else None,
        user_metadata=saved.user_metadata,
    )


async def find_checkpoint(
    database: Database, *, path: str, tenant_id: str, public: bool = False
) -> CheckpointRow:
    """The live checkpoint of a path; `public` takes those of other tenants, too, that are shown to all.

    Raises:
        NotFoundError: there is none.
    """
    query = _FIND_READABLE_CHECKPOINT if public else _FIND_CHECKPOINT
    return _checkpoint(await _row_at(database, path, query, tenant_id))


async def set_expiry(
    database: Database, *, path: str, tenant_id: str, ttl_s: int | None
) -> CheckpointRow:
    """The live checkpoint of a path, which expires in `ttl_s` from now on, or never.

    Raises:
        NotFoundError: there is none.
    """
    return _checkpoint(await _row_at(database, path, _SET_EXPIRY, tenant_id, ttl_s))


async def _row_at(database: Database, path: str, query: str, *arguments: object) -> Row:
    """What `query` answers for the parts of a path, the `arguments` following them.

    Raises:
        NotFoundError: nothing.
    """
    parsed = parse_path(path)
    row = None
    if parsed is not None and parsed.name is not None:
        row = await database.fetchrow(query, parsed.run_id, parsed.mode, parsed.name, *arguments)
    if row is None:
        raise NotFoundError(f"there is no checkpoint {path!r}", param="path")
    return row


async def find_checkpoint_of_step(
    database: Database, *, run_id: str, step: int, tenant_id: str
) -> CheckpointRow | None:
    """The newest live checkpoint of a policy version."""
    row = await database.fetchrow(_FIND_CHECKPOINT_OF_STEP, run_id, step, tenant_id)
    return _checkpoint(row) if row else None


async def find_checkpoints(
    database: Database, *, checkpoint_ids: Sequence[str], tenant_id: str
) -> list[CheckpointRow]:
    """Those of these checkpoints that are live, in any order."""
    rows = await database.fetch(_FIND_CHECKPOINTS, checkpoint_ids, tenant_id)
    return [_checkpoint(row) for row in rows]


async def list_checkpoints(database: Database, tenant_id: str) -> list[CheckpointRow]:
    """The newest live checkpoints, newest first."""
    rows = await database.fetch(_LIST_CHECKPOINTS, tenant_id, PAGE_ROWS_MAX)
    return [_checkpoint(row) for row in rows]


async def delete_checkpoint(
    database: Database, *, path: str, tenant_id: str
) -> tuple[str, str] | None:
    """Takes a checkpoint out of the catalog; again is a no-op.

    Returns its id and the location of its files, None when those are gone already, or copies still need them.

    Raises:
        NotFoundError: there never was one.
    """
    row = await _row_at(database, path, _DELETE_CHECKPOINT, tenant_id)
    if row["files_removed_at"] or await database.fetchval(_IS_SHARED, row["location"]) is not None:
        return None
    return row["checkpoint_id"], row["location"]


async def ended_checkpoints(
    database: Database, *, root: str, grace_s: float, limit: int
) -> list[tuple[str, str]]:
    """Ids and locations of checkpoints below `root` that ended `grace_s` ago and may have files still, oldest first."""
    rows = await database.fetch(_ENDED_CHECKPOINTS, root, grace_s, limit)
    return [(row["checkpoint_id"], row["location"]) for row in rows]


async def mark_files_removed(database: Database, checkpoint_id: str) -> None:
    """Notes that there is nothing left to remove."""
    await database.execute(_MARK_FILES_REMOVED, checkpoint_id)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _run(row: Row) -> RunRow:
    return RunRow(
        run_id=row["run_id"],
        session_id=row["session_id"],
        base_model=row["base_model"],
        lora=msgspec.json.decode(row["lora"], type=wire.LoraConfig),
        context_length=row["context_length"],
        created_at=row["created_at"].isoformat(),
        last_seq=row["last_seq"],
        step=row["step"],
        metrics=msgspec.json.decode(row["metrics"], type=dict[str, float]),
        imported=row["imported"],
        lost=row["lost"],
        tags=msgspec.json.decode(row["tags"], type=dict[str, str]),
        user_metadata=msgspec.json.decode(row["user_metadata"], type=dict[str, str]),
        model_seq_id=row["model_seq_id"],
        updated_at=row["updated_at"].isoformat(),
    )


def _checkpoint(row: Row) -> CheckpointRow:
    expires_at = cast("dt.datetime | None", row["expires_at"])
    return CheckpointRow(
        location=row["location"],
        tenant_id=row["tenant_id"],
        checkpoint=wire.Checkpoint(
            checkpoint_id=row["checkpoint_id"],
            path=checkpoint_path(row["run_id"], row["mode"], row["name"]),
            run_id=row["run_id"],
            mode=row["mode"],
            name=row["name"],
            base_model=row["base_model"],
            policy_version=policy_version(row["run_id"], row["step"]),
            size_bytes=row["size_bytes"],
            created_at=row["created_at"].isoformat(),
            expires_at=expires_at.isoformat() if expires_at else None,
            public=row["public"],
            user_metadata=msgspec.json.decode(row["user_metadata"], type=dict[str, str]),
        ),
    )
