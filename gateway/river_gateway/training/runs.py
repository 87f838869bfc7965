"""Runs as operations need them: what never changes about one, remembered, so that not every request asks Postgres."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.limits import RUN_CACHE_ENTRIES_MAX, RUN_CACHE_FRESH_S
from river_gateway.lru import Lru

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.database import Database


class RunCache:
    """Runs by tenant, as they were up to `RUN_CACHE_FRESH_S` ago, in a bounded LRU.

    Nothing but `last_seq`, `step` and `metrics` of a run ever changes, and these only grow or are replaced by newer
    ones; whoever needs them as they are asks for a `current` one. What is not there is not remembered.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: Lru[tuple[str, str], tuple[RunRow, float]] = Lru(RUN_CACHE_ENTRIES_MAX)

    async def find(self, run_id: str, tenant_id: str) -> RunRow:
        """One run.

        Raises:
            NotFoundError: it is unknown.
        """
        cached = self._entries.use((tenant_id, run_id))
        if cached is None or time.monotonic() - cached[1] > RUN_CACHE_FRESH_S:
            return await self.current(run_id, tenant_id)
        return cached[0]

    async def current(self, run_id: str, tenant_id: str) -> RunRow:
        """The same, as Postgres has it now."""
        run = await catalog.find_run(self._database, run_id=run_id, tenant_id=tenant_id)
        self._entries.put((tenant_id, run_id), (run, time.monotonic()))
        return run
