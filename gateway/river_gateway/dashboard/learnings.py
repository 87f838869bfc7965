"""Runs that learn from feedback, as the dashboard shows them: how far each has come, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from river_gateway.errors import NotFoundError
from river_gateway.feedback import learning, rewards

if TYPE_CHECKING:
    from datetime import datetime

    from river_client.learning_wire import LearningState
    from river_gateway.database import Database, Row

LEARNINGS_SHOWN = 100

_COLUMNS = """
select l.*, t.name as tenant, r.base_model from learning l
join tenant t on t.tenant_id = l.tenant_id join run r on r.run_id = l.run_id
where ($1::text is null or l.tenant_id = $1)
"""
_LIST = f"""
{_COLUMNS} order by l.status in ('learning', 'stopping') desc, l.started_at desc, l.run_id limit $2
"""
_ONE = f"{_COLUMNS} and l.run_id = $2"


@dataclass(frozen=True, slots=True)
class ShownLearning:
    """A run's learning; `waiting` rewarded completions wait for its next step, no more than it needs are counted."""

    tenant_id: str
    tenant: str
    key_id: str
    started_at: datetime
    ended_at: datetime | None
    step: int
    busy: bool
    waiting: int
    state: LearningState


async def list_learnings(database: Database, tenant_id: str | None) -> list[ShownLearning]:
    """Those that go on first, then the newest."""
    rows = await database.fetch(_LIST, tenant_id, LEARNINGS_SHOWN)
    return [await _shown(database, row) for row in rows]


async def find_learning(database: Database, tenant_id: str | None, run_id: str) -> ShownLearning:
    """One.

    Raises:
        NotFoundError: the run has never learnt, or is another tenant's.
    """
    row = await database.fetchrow(_ONE, tenant_id, run_id)
    if row is None:
        raise NotFoundError(f"{run_id!r} has not learnt from feedback", param="run_id")
    return await _shown(database, row)


async def _shown(database: Database, row: Row) -> ShownLearning:
    state = learning.state_of(row)
    waiting = 0
    if state.status == "learning":
        asked = learning.next_batch(state.run_id, row["base_model"], state.settings)
        waiting = await rewards.count_unused(database, tenant_id=row["tenant_id"], asked=asked)
    return ShownLearning(
        tenant_id=row["tenant_id"],
        tenant=row["tenant"],
        key_id=row["key_id"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        step=row["step"],
        busy=row["batch_id"] is not None,
        waiting=waiting,
        state=state,
    )
