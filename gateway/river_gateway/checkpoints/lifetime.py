"""For how long a checkpoint is kept, changed after it was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.tenancy import audit
from river_gateway.training import validation

if TYPE_CHECKING:
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor


async def set_ttl(
    services: Services, *, tenant_id: str, path: str, ttl_s: int | None, by: Actor
) -> wire.Checkpoint:
    """Keeps a checkpoint for so many seconds from now, or for ever; one that has expired is gone, and stays so.

    Raises:
        NotFoundError: there is no such checkpoint.
        InvalidFieldError: it is out of range.
    """
    validation.ttl_s(ttl_s)
    async with audit.recorded(services.pool, by, "checkpoints.ttl") as line:
        row = await catalog.set_expiry(line.connection, path=path, tenant_id=tenant_id, ttl_s=ttl_s)
        line.about(path, tenant_id=tenant_id, details=wire.ChangeTtl(ttl_s=ttl_s))
    await services.names.changed(None, path)  # Others know it too where it is public.
    return row.checkpoint
