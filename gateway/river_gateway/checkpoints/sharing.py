"""Checkpoints that others may use: shown to all tenants, and copied by whoever can read them.

A copy shares its files with what it is a copy of, which stay until the last of them has gone; its storage is its
owner's to pay. It hangs on a run of its own that is never trained on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from river_billing.catalog import record_checkpoint
from river_billing.events import CheckpointSaved
from river_gateway.checkpoints import catalog
from river_gateway.errors import ConflictError, NotFoundError
from river_gateway.ids import checkpoint_id
from river_gateway.tenancy import audit
from river_gateway.training import validation

if TYPE_CHECKING:
    from river_billing.database import Connection
    from river_client import wire
    from river_gateway.checkpoints.catalog import CheckpointRow, RunRow
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_SHOW = """
update checkpoint set public = $2 where checkpoint_id = $1 and deleted_at is null and public <> $2
returning checkpoint_id
"""
# Whoever deletes it meanwhile waits, and then sees the copy.
_HOLD = (
    "select checkpoint_id from checkpoint where checkpoint_id = $1 and deleted_at is null for share"
)


# ---- Shown to all ----------------------------------------------------------------------------------------------------


async def publish(services: Services, *, tenant_id: str, path: str, by: audit.Actor) -> None:
    """Lets every tenant load a checkpoint and sample from it, by its path.

    Raises:
        NotFoundError: there is none.
        ConflictError: they may already.
    """
    async with audit.recorded(services.pool, by, "checkpoints.publish") as line:
        await _show(line, path, tenant_id, public=True)
    await services.names.changed(None, path)


async def unpublish(services: Services, *, tenant_id: str, path: str, by: audit.Actor) -> None:
    """Lets nobody else use a checkpoint from now on; copies of it stay.

    Raises:
        NotFoundError: there is none.
        ConflictError: nobody else may.
    """
    async with audit.recorded(services.pool, by, "checkpoints.unpublish") as line:
        await _show(line, path, tenant_id, public=False)
    await services.names.changed(None, path)


async def _show(line: audit.Line, path: str, tenant_id: str, *, public: bool) -> None:
    row = await catalog.find_checkpoint(line.connection, path=path, tenant_id=tenant_id)
    line.about(path, tenant_id=tenant_id)
    if await line.connection.fetchval(_SHOW, row.checkpoint.checkpoint_id, public) is None:
        state = "published already" if public else "not published"
        raise ConflictError(f"path: {row.checkpoint.name!r} is {state}", param="path")


# ---- Copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a copy goes: a new run, in a session that is there."""

    session_id: str
    run_id: str
    model_seq_id: int | None = None


async def copy_checkpoint(
    services: Services,
    principal: Principal,
    *,
    path: str,
    place: Place,
    ttl_s: int | None,
    by: audit.Actor,
) -> wire.Checkpoint:
    """A copy of one's own checkpoint, or of one that is shown to all; the same place again is the same copy.

    It has the name and the kind of what it is a copy of, and a time to live of its own. What another
    tenant wrote on it does not go along.

    Raises:
        NotFoundError: there is no such checkpoint or session.
        InvalidFieldError: `ttl_s` is out of range.
        ConflictError: the place is taken by another run.
    """
    validation.ttl_s(ttl_s)
    tenant_id = principal.tenant_id
    async with audit.recorded(services.pool, by, "checkpoints.copy") as line:
        row = await catalog.find_checkpoint(
            line.connection, path=path, tenant_id=tenant_id, public=True
        )
        source = await services.runs.find(row.checkpoint.run_id, row.tenant_id)
        saved = _copy_of(row, place, tenant_id, ttl_s)
        line.about(path, tenant_id=tenant_id, details={"run_id": place.run_id, "ttl_s": ttl_s})
        await _write(line.connection, row, source, place, saved)
        made = catalog.checkpoint_path(saved.run_id, saved.mode, saved.name)
        copied = await catalog.find_checkpoint(line.connection, path=made, tenant_id=tenant_id)
    await services.names.changed(tenant_id, made)
    return copied.checkpoint


def _copy_of(
    row: CheckpointRow, place: Place, tenant_id: str, ttl_s: int | None
) -> CheckpointSaved:
    original, now = row.checkpoint, time.time()
    return CheckpointSaved(
        checkpoint_id=checkpoint_id(f"{place.run_id}-copy"),
        run_id=place.run_id,
        tenant_id=tenant_id,
        base_model=original.base_model,
        name=original.name,
        mode=original.mode,
        step=int(original.policy_version.rpartition("@")[2]),
        location=row.location,
        size_bytes=original.size_bytes,
        created_at=now,
        expires_at=None if ttl_s is None else now + ttl_s,
        user_metadata=original.user_metadata if row.tenant_id == tenant_id else {},
    )


async def _write(
    connection: Connection,
    row: CheckpointRow,
    source: RunRow,
    place: Place,
    saved: CheckpointSaved,
) -> None:
    if await connection.fetchval(_HOLD, row.checkpoint.checkpoint_id) is None:
        raise NotFoundError(f"there is no checkpoint {row.checkpoint.path!r}", param="path")
    is_new = await catalog.insert_run(
        connection,
        run_id=place.run_id,
        tenant_id=saved.tenant_id,
        session_id=place.session_id,
        base_model=saved.base_model,
        lora=source.lora,
        context_length=source.context_length,
        imported=True,
        user_metadata=source.user_metadata if row.tenant_id == saved.tenant_id else {},
        model_seq_id=place.model_seq_id,
    )
    if not is_new:
        held = await connection.fetchval(
            "select location from checkpoint where checkpoint_id = $1", saved.checkpoint_id
        )
        if cast("str | None", held) != row.location:
            raise ConflictError(f"{place.run_id}: another run was made there", param="run_id")
    await record_checkpoint(connection, saved)
