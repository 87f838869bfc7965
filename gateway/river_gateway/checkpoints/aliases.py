"""Aliases in Postgres: a tenant's model names, every version of what they point at, and the way back.

An alias points at its version in force. Setting one adds a version that remembers the one before; rolling back points
at that again. Both are one transaction, and nothing is ever changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.limits import (
    ALIAS_TARGETS_MAX,
    ALIAS_VERSIONS_KEPT,
    ALIAS_WEIGHT_MAX,
    PAGE_ROWS_MAX,
)
from river_gateway.tenancy import audit
from river_gateway.training import validation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_billing.database import Connection
    from river_gateway.database import Database, Row
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor

_CURRENT = """
select a.name, a.version, a.updated_at, v.targets
from alias a join alias_version v using (tenant_id, name, version)
"""
_FIND = _CURRENT + "where a.tenant_id = $1 and a.name = $2"
_LIST = _CURRENT + "where a.tenant_id = $1 order by a.name limit $2"
_EVERY_TARGET = """
select distinct target.value ->> 'target' as target
from alias_version v, jsonb_array_elements(v.targets) target
where v.tenant_id = $1 and v.name = $2
"""
_HISTORY = """
select name, version, created_at as updated_at, targets from alias_version
where tenant_id = $1 and name = $2 order by version desc limit $3
"""
# The row's lock orders writers of one alias; version 0 is that of one not there before.
_LOCK = """
insert into alias (tenant_id, name, version) values ($1, $2, 0)
on conflict (tenant_id, name) do update set name = excluded.name returning version
"""
_ADD_VERSION = """
insert into alias_version (tenant_id, name, version, targets, previous)
select $1, $2, coalesce(max(version), 0) + 1, $3::jsonb, nullif($4::integer, 0)
from alias_version where tenant_id = $1 and name = $2
returning version
"""
_POINT = "update alias set version = $3, updated_at = now() where tenant_id = $1 and name = $2"
_FORGET_OLD = "delete from alias_version where tenant_id = $1 and name = $2 and version <= $3"
_PREVIOUS = """
select v.version as now, p.version, p.targets
from alias_version v
left join alias_version p on p.tenant_id = v.tenant_id and p.name = v.name and p.version = v.previous
where v.tenant_id = $1 and v.name = $2 and v.version = $3
"""
_ROLL_BACK = """
update alias set version = $3, updated_at = now()
where tenant_id = $1 and name = $2 and version = $4
"""
_DELETE = "delete from alias where tenant_id = $1 and name = $2 returning name"


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """An alias, and every target that it has or had: what a request may be pinned to."""

    alias: wire.Alias
    ever: frozenset[str]


async def find(database: Database, *, name: str, tenant_id: str) -> Served | None:
    """One alias."""
    row = await database.fetchrow(_FIND, tenant_id, name)
    if row is None:
        return None
    every = await database.fetch(_EVERY_TARGET, tenant_id, name)
    return Served(alias=_alias(row), ever=frozenset(target["target"] for target in every))


async def get(database: Database, *, name: str, tenant_id: str) -> wire.Alias:
    """What an alias points at.

    Raises:
        NotFoundError: there is none of that name.
    """
    row = await database.fetchrow(_FIND, tenant_id, name)
    if row is None:
        raise _no_alias(name)
    return _alias(row)


async def list_all(database: Database, tenant_id: str) -> list[wire.Alias]:
    """The tenant's aliases by name."""
    return [_alias(row) for row in await database.fetch(_LIST, tenant_id, PAGE_ROWS_MAX)]


async def history(database: Database, *, name: str, tenant_id: str) -> list[wire.Alias]:
    """What an alias has pointed at, newest first.

    Raises:
        NotFoundError: there is none of that name.
    """
    rows = await database.fetch(_HISTORY, tenant_id, name, PAGE_ROWS_MAX)
    if not rows:
        raise _no_alias(name)
    return [_alias(row) for row in rows]


async def point(
    services: Services, *, tenant_id: str, name: str, asked: wire.PutAlias, by: Actor
) -> wire.Alias:
    """Points a name at a base model, a checkpoint or a run's live version, or shares its requests among several.

    Raises:
        InvalidFieldError: the name or what is asked for is none.
        ConflictError: the name is a base model's.
        NotFoundError: a target is unknown.
    """
    validation.name(name, "name")
    if name in services.engines.bases() | services.trainers.bases():
        raise ConflictError(f"{name!r} is the name of a base model", param="name")
    targets = targets_of(asked)
    await check_targets(services, targets, tenant_id)
    async with audit.recorded(services.pool, by, "aliases.put") as line:
        alias = await put(line.connection, tenant_id=tenant_id, name=name, targets=targets)
        details = {"targets": targets, "version": alias.version}
        line.about(name, tenant_id=tenant_id, details=details)
    await services.names.changed(tenant_id, name)
    return alias


async def put(
    connection: Connection, *, tenant_id: str, name: str, targets: Sequence[wire.AliasTarget]
) -> wire.Alias:
    """Points a name at targets, new or anew; the same again is a no-op, so that a repeated request is none too many."""
    wanted = msgspec.json.encode(targets).decode()
    async with connection.transaction():
        before = await connection.fetchval(_LOCK, tenant_id, name)
        current = await connection.fetchrow(_FIND, tenant_id, name)
        if current is None or _targets(current) != list(targets):
            await _add_version(connection, tenant_id, name, wanted, before)
            current = await connection.fetchrow(_FIND, tenant_id, name)
    assert current is not None
    return _alias(current)


async def _add_version(
    connection: Connection, tenant_id: str, name: str, targets: str, before: int
) -> None:
    version = await connection.fetchval(_ADD_VERSION, tenant_id, name, targets, before)
    await connection.execute(_POINT, tenant_id, name, version)
    await connection.execute(_FORGET_OLD, tenant_id, name, version - ALIAS_VERSIONS_KEPT)


async def roll_back(
    services: Services, *, tenant_id: str, name: str, version: int | None = None, by: Actor
) -> wire.Alias:
    """Points a name at what it pointed at before; `version` is the one to be left, else the one in force.

    Raises:
        NotFoundError: there is none of that name.
        ConflictError: there is no version before, one of its targets is gone, or somebody else wrote meanwhile.
    """
    current = await get(services.pool, name=name, tenant_id=tenant_id)
    row = await services.pool.fetchrow(_PREVIOUS, tenant_id, name, version or current.version)
    if row is None:
        raise ConflictError(f"{name!r} has no version {version}", param="version")
    if row["version"] is None:
        raise ConflictError(f"{name!r} has no earlier version to go back to", param="name")
    try:
        await check_targets(services, _targets(row), tenant_id)
    except NotFoundError as error:
        raise ConflictError(
            f"{name!r} cannot go back to version {row['version']}: {error.message}", param="name"
        ) from None
    async with audit.recorded(services.pool, by, "aliases.rollback") as line:
        await line.connection.execute(_ROLL_BACK, tenant_id, name, row["version"], row["now"])
        current = await get(line.connection, name=name, tenant_id=tenant_id)
        if current.version != row["version"]:
            raise ConflictError(
                f"{name!r} is at version {current.version}, not {row['now']}; look again",
                param="version",
            )
        details = {"from_version": row["now"], "to_version": row["version"]}
        line.about(name, tenant_id=tenant_id, details=details)
    await services.names.changed(tenant_id, name)
    return current


async def delete(services: Services, *, tenant_id: str, name: str, by: Actor) -> None:
    """Removes an alias with its history.

    Raises:
        NotFoundError: there is none of that name.
    """
    async with audit.recorded(services.pool, by, "aliases.delete") as line:
        if await line.connection.fetchval(_DELETE, tenant_id, name) is None:
            raise _no_alias(name)
        line.about(name, tenant_id=tenant_id)
    await services.names.changed(tenant_id, name)


# ---- Targets ---------------------------------------------------------------------------------------------------------


def targets_of(asked: wire.PutAlias) -> list[wire.AliasTarget]:
    """The targets that are asked for, however they are written.

    Raises:
        InvalidFieldError: there are none or too many, one comes twice, or a weight is out of range.
    """
    if (asked.target is None) == (asked.targets is None):
        raise InvalidFieldError("target: give either `target` or `targets`", param="target")
    if asked.targets is None:
        assert asked.target is not None
        return [wire.AliasTarget(target=asked.target)]
    if not 1 <= len(asked.targets) <= ALIAS_TARGETS_MAX:
        raise InvalidFieldError(
            f"targets: {len(asked.targets)} of them, must be 1 to {ALIAS_TARGETS_MAX}",
            param="targets",
        )
    seen: set[str] = set()
    for index, entry in enumerate(asked.targets):
        if not 1 <= entry.weight <= ALIAS_WEIGHT_MAX:
            field = f"targets[{index}].weight"
            raise InvalidFieldError(
                f"{field}: {entry.weight}, must be 1 to {ALIAS_WEIGHT_MAX}", param=field
            )
        if entry.target in seen:
            field = f"targets[{index}].target"
            raise InvalidFieldError(f"{field}: {entry.target!r} comes twice", param=field)
        seen.add(entry.target)
    return asked.targets


async def check_targets(
    services: Services, targets: Sequence[wire.AliasTarget], tenant_id: str
) -> None:
    """Makes sure that all targets are there.

    Raises:
        InvalidFieldError: one is no base model and no path.
        NotFoundError: one is unknown.
    """
    for index, entry in enumerate(targets):
        field = "target" if len(targets) == 1 else f"targets[{index}].target"
        if entry.target in services.engines.bases():
            continue
        path = catalog.parse_path(entry.target)
        if path is None:
            raise InvalidFieldError(
                f"{field}: {entry.target!r} must be a base model, river://<run> or the path of a checkpoint",
                param=field,
            )
        try:
            if path.name is None:
                await catalog.find_run(services.pool, run_id=path.run_id, tenant_id=tenant_id)
            else:
                await catalog.find_checkpoint(services.pool, path=entry.target, tenant_id=tenant_id)
        except NotFoundError as error:
            raise NotFoundError(error.message, param=field) from None


def _no_alias(name: str) -> NotFoundError:
    return NotFoundError(f"there is no alias {name!r}", param="name")


def _targets(row: Row) -> list[wire.AliasTarget]:
    return msgspec.json.decode(row["targets"], type=list[wire.AliasTarget])


def _alias(row: Row) -> wire.Alias:
    targets = _targets(row)
    return wire.Alias(
        name=row["name"],
        target=max(targets, key=lambda entry: entry.weight).target,
        targets=targets,
        version=row["version"],
        updated_at=row["updated_at"].isoformat(),
    )
