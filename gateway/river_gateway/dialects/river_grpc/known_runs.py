"""The runs of sessions, remembered for a moment: heartbeats tell how they fare, and one comes every two seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from river_gateway.dialects.river_grpc.limits import (
    SESSION_RUNS_FRESH_S,
    SESSION_RUNS_MAX,
    SESSIONS_REMEMBERED_MAX,
)
from river_gateway.lru import Lru

if TYPE_CHECKING:
    from river_gateway.database import Database

_RUNS_OF_SESSION = """
select run_id, base_model from run where tenant_id = $1 and session_id = $2
order by created_at desc limit $3
"""


class KnownRuns:
    """Ids and base models of the newest runs of each session, at most `SESSION_RUNS_FRESH_S` old."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: Lru[tuple[str, str], tuple[list[tuple[str, str]], float]] = Lru(
            SESSIONS_REMEMBERED_MAX
        )

    async def of(self, session_id: str, tenant_id: str) -> list[tuple[str, str]]:
        """The runs of a session of this tenant's."""
        known = self._entries.use((tenant_id, session_id))
        if known is not None and time.monotonic() - known[1] < SESSION_RUNS_FRESH_S:
            return known[0]
        rows = await self._database.fetch(_RUNS_OF_SESSION, tenant_id, session_id, SESSION_RUNS_MAX)
        runs = [(str(row["run_id"]), str(row["base_model"])) for row in rows]
        self._entries.put((tenant_id, session_id), (runs, time.monotonic()))
        return runs

    def forget(self, session_id: str, tenant_id: str) -> None:
        """Says that a session has another run."""
        self._entries.pop((tenant_id, session_id), None)
