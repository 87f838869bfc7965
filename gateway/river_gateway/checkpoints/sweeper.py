"""Removes the files of checkpoints that are gone: expired, replaced by another of their name, or deleted.

A checkpoint that has expired cannot be found from that moment on; only its files stay a while, for operations that were
accepted before. Every gateway sweeps, and removing twice is a no-op.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.files import remove_files
from river_gateway.database import POSTGRES_AWAY
from river_gateway.errors import GatewayError
from river_gateway.limits import SWEEP_BATCH

if TYPE_CHECKING:
    from river_gateway.database import Database

logger = logging.getLogger("river.gateway")


async def sweep_forever(
    database: Database, store_url: str, *, interval_s: float, grace_s: float
) -> None:
    """Sweeps every `interval_s`, for as long as Postgres and the store are there."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await sweep(database, store_url, grace_s=grace_s)
        except POSTGRES_AWAY as error:
            logger.warning("checkpoints were not swept: %r", error)


async def sweep(database: Database, store_url: str, *, grace_s: float) -> int:
    """Removes the files of checkpoints under `store_url` that ended `grace_s` ago; returns how many they were."""
    removed = 0
    root = store_url.rstrip("/") + "/"
    ended = await catalog.ended_checkpoints(database, root=root, grace_s=grace_s, limit=SWEEP_BATCH)
    for checkpoint_id, location in ended:
        try:
            await remove_files(location)
        except GatewayError as error:
            logger.warning("files of a checkpoint are left: %s", error.message)
            continue
        await catalog.mark_files_removed(database, checkpoint_id)
        removed += 1
    if removed:
        logger.info("removed the files of %d checkpoints", removed)
    return removed
