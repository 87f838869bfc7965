"""Deleting a checkpoint: out of the catalog, out of what names mean, and its files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.files import is_below, remove_files
from river_gateway.errors import GatewayError
from river_gateway.tenancy import audit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor

logger = logging.getLogger("river.gateway")


async def remove_checkpoint(
    services: Services, *, path: str, tenant_id: str, log_ids: Mapping[str, object], by: Actor
) -> None:
    """Deletes a checkpoint and its files; again is a no-op. An engine that holds it may go on until it lets go.

    Raises:
        NotFoundError: there never was one.
    """
    async with audit.recorded(services.pool, by, "checkpoints.delete") as line:
        deleted = await catalog.delete_checkpoint(line.connection, path=path, tenant_id=tenant_id)
        line.about(path, tenant_id=tenant_id)
    await services.names.changed(None, path)  # Others may have sampled from it.
    if deleted is None:
        return
    checkpoint_id, location = deleted
    if not is_below(location, services.settings.store_url):
        logger.info("files of a deleted checkpoint are left", extra=log_ids)
        return
    try:
        await remove_files(location)
    except GatewayError as error:  # The sweeper tries again.
        logger.warning("files of a deleted checkpoint are left: %s", error.message, extra=log_ids)
        return
    await catalog.mark_files_removed(services.pool, checkpoint_id)
