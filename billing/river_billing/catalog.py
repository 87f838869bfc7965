"""What runs and checkpoints there are: the tables `run`, `run_metric` and `checkpoint`."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

from river_billing.database import Connection
from river_billing.events import CheckpointSaved, RunAdvanced

# Written even when newer operations were recorded first; the unique seq keeps it single.
_INSERT_METRIC = """
insert into run_metric (run_id, seq, step, logged_at, metrics)
select run_id, $2, $3, $4, $5::jsonb from run where run_id = $1
on conflict (run_id, seq) where seq is not null do nothing
"""

# Each metric keeps its newest value: an operation without metrics erases nothing.
_ADVANCE_RUN = """
update run set
  last_seq   = greatest(last_seq, $2),
  step       = case when $2 > last_seq then $3 else step end,
  metrics    = case when $2 > last_seq then metrics || $5::jsonb else $5::jsonb || metrics end,
  lost       = coalesce(lost, $6),
  updated_at = greatest(updated_at, $4)
where run_id = $1
"""

# The row lock lets one writer at a time decide which checkpoint of a path is the live one.
_LOCK_RUN = "select 1 from run where run_id = $1 for no key update"

_CHECKPOINT_EXISTS = "select 1 from checkpoint where checkpoint_id = $1"

_REPLACE_CHECKPOINT = """
update checkpoint set deleted_at = $4
where run_id = $1 and mode = $2 and name = $3 and deleted_at is null and created_at <= $4
"""

# One that arrives after its own replacement is written down as replaced already.
_INSERT_CHECKPOINT = """
insert into checkpoint (checkpoint_id, tenant_id, run_id, base_model, mode, name, step, location,
                        size_bytes, created_at, expires_at, user_metadata, deleted_at)
select $1, r.tenant_id, r.run_id, $3, $4, $5, $6, $7, $8, $9, $10, $11::jsonb,
       (select c.created_at from checkpoint c
        where c.run_id = r.run_id and c.mode = $4 and c.name = $5 and c.deleted_at is null)
from run r where r.run_id = $2
"""


async def advance_run(connection: Connection, event: RunAdvanced) -> bool:
    """Writes down what an operation did to its run; older news never overwrites newer.

    Returns False when there is no such run. Doing it twice changes nothing.
    """
    # JSON has no NaN: a metric that is not finite is left out.
    finite = {name: value for name, value in event.metrics.items() if math.isfinite(value)}
    values = (event.run_id, event.seq, event.step, _moment(event.occurred_at), json.dumps(finite))
    async with connection.transaction():
        status = await connection.execute(_ADVANCE_RUN, *values, event.lost)
        if status == "UPDATE 0":
            return False
        if finite:
            await connection.execute(_INSERT_METRIC, *values)
    return True


async def record_checkpoint(connection: Connection, event: CheckpointSaved) -> bool:
    """Adds a checkpoint to the catalog; the live one of the same path, if older, is marked deleted.

    Returns False when there is no such run. Doing it twice changes nothing, in any order with
    others. The tenant is taken from the run.
    """
    created_at = _moment(event.created_at)
    expires_at = None if event.expires_at is None else _moment(event.expires_at)
    async with connection.transaction():
        if await connection.fetchval(_LOCK_RUN, event.run_id) is None:
            return False
        if await connection.fetchval(_CHECKPOINT_EXISTS, event.checkpoint_id) is not None:
            return True
        path = (event.run_id, event.mode, event.name)
        await connection.execute(_REPLACE_CHECKPOINT, *path, created_at)
        await connection.execute(
            _INSERT_CHECKPOINT,
            event.checkpoint_id,
            event.run_id,
            event.base_model,
            event.mode,
            event.name,
            event.step,
            event.location,
            event.size_bytes,
            created_at,
            expires_at,
            json.dumps(event.user_metadata),
        )
    return True


def _moment(unix_time_s: float) -> datetime:
    return datetime.fromtimestamp(unix_time_s, UTC)
