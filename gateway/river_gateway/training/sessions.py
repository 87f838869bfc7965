"""Sessions: what a client's runs belong to while it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.ids import idempotent_id
from river_gateway.training import validation

if TYPE_CHECKING:
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal


async def open_session(
    services: Services, principal: Principal, *, tags: dict[str, str], identity: str | None
) -> str:
    """The id of a new session, or of the one opened before under the same `identity`.

    Raises:
        InvalidFieldError: there are too many tags, or too long ones.
    """
    session_id = idempotent_id("ses", principal.tenant_id, identity)
    await catalog.insert_session(
        services.pool,
        session_id=session_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        tags=validation.tags(tags),
    )
    return session_id


async def beat_session(services: Services, principal: Principal, session_id: str) -> None:
    """Notes that the client of a session is alive.

    Raises:
        NotFoundError: there is no such session, or it has ended.
    """
    await catalog.beat_session(services.pool, session_id=session_id, tenant_id=principal.tenant_id)


async def end_session(services: Services, principal: Principal, session_id: str) -> None:
    """Ends a session; its runs and checkpoints stay.

    Raises:
        NotFoundError: there is no such session.
    """
    await catalog.end_session(services.pool, session_id=session_id, tenant_id=principal.tenant_id)
