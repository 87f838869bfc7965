"""Sampling sessions: what a sampling client samples from, settled when it is made, and remembered by every gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.dialects.tinker.ids import check_sampler_id, sampler_id
from river_gateway.errors import ConflictError, NotFoundError
from river_gateway.limits import SAMPLER_CACHE_ENTRIES_MAX
from river_gateway.lru import Lru

if TYPE_CHECKING:
    from river_gateway.database import Database
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_INSERT = """
insert into sampling_session (sampling_session_id, tenant_id, session_id, base_model, model, model_path)
values ($1, $2, $3, $4, $5, $6) on conflict (sampling_session_id) do nothing
"""
_FIND = """
select sampling_session_id, base_model, model, model_path from sampling_session
where sampling_session_id = $1 and tenant_id = $2
"""
_OF_SESSION = """
select sampling_session_id from sampling_session where session_id = $1 and tenant_id = $2
order by created_at, sampling_session_id
"""
_JOIN = """
update sampling_session set clones = clones + 1 where sampling_session_id = $1 and tenant_id = $2
returning clones
"""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling session. `model` is what River calls it, `model_path` what its client does, if it gave a path."""

    sampler_id: str
    base_model: str
    model: str
    model_path: str | None


class Samplers:
    """Sampling sessions by tenant, which never change, in a bounded LRU."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: Lru[tuple[str, str], Sampler] = Lru(SAMPLER_CACHE_ENTRIES_MAX)

    async def find(self, sampler: str, tenant_id: str) -> Sampler:
        """One sampling session.

        Raises:
            NotFoundError: it is unknown.
        """
        known = self._known.use((tenant_id, sampler))
        if known is not None:
            return known
        row = await self._database.fetchrow(_FIND, check_sampler_id(sampler), tenant_id)
        if row is None:
            raise _unknown(sampler)
        found = Sampler(
            row["sampling_session_id"], row["base_model"], row["model"], row["model_path"]
        )
        self._known.put((tenant_id, sampler), found)
        return found

    async def join(self, sampler: str, tenant_id: str) -> int:
        """A number for one more copy of a session's client, counted from 1.

        Raises:
            NotFoundError: there is no such session.
        """
        clones = await self._database.fetchval(_JOIN, check_sampler_id(sampler), tenant_id)
        if clones is None:
            raise _unknown(sampler)
        return int(clones)


async def open_sampler(
    services: Services,
    principal: Principal,
    *,
    session_id: str,
    number: int,
    base_model: str,
    model: str,
    model_path: str | None,
) -> str:
    """The id of the `number`-th sampling session of a session; again is a no-op.

    Raises:
        NotFoundError: the session is unknown or has ended.
        ConflictError: that number is of another model.
    """
    await catalog.check_open_session(
        services.pool, session_id=session_id, tenant_id=principal.tenant_id
    )
    sampler = sampler_id(session_id, number)
    await services.pool.execute(
        _INSERT, sampler, principal.tenant_id, session_id, base_model, model, model_path
    )
    found = await services.samplers.find(sampler, principal.tenant_id)
    if (found.base_model, found.model, found.model_path) != (base_model, model, model_path):
        raise ConflictError(
            f"sampling_session_seq_id: {number} is of another model already",
            param="sampling_session_seq_id",
        )
    return sampler


def _unknown(sampler: str) -> NotFoundError:
    return NotFoundError(f"there is no sampling session {sampler!r}", param="sampling_session_id")


async def of_session(database: Database, session_id: str, tenant_id: str) -> list[str]:
    """The names of a session's sampling sessions, oldest first."""
    rows = await database.fetch(_OF_SESSION, session_id, tenant_id)
    return [row["sampling_session_id"] for row in rows]
