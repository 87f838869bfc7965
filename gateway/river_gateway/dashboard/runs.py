"""Runs as the dashboard shows them: a searchable list, one run, and the series of its metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from river_gateway.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from river_gateway.database import Database, Row

PAGE_RUNS = 50
SERIES_STEPS_MAX = 2_000
SEARCH_CHARS_MAX = 200
RUN_OVERLAYS_MAX = 7

Status = Literal["training", "open", "ended", "lost"]
STATUSES: tuple[Status, ...] = get_args(Status)

# A run is in training while results of its operations come; open while its session lives.
_STATUS = """
case when r.lost is not null then 'lost'
     when r.updated_at >= now() - interval '60 seconds' and r.last_seq >= 0 then 'training'
     when s.ended_at is null and s.heartbeat_at >= now() - interval '5 minutes' then 'open'
     else 'ended' end
"""
_COLUMNS = f"""
select r.run_id, r.tenant_id, t.name as tenant, r.base_model, r.lora, r.context_length, r.created_at, r.updated_at,
       r.step, r.metrics, r.lost, s.tags, {_STATUS} as status, logged.metrics as logged
from run r join session s using (session_id) join tenant t on t.tenant_id = r.tenant_id
left join lateral (
  select m.metrics from run_metric m where m.run_id = r.run_id and m.seq is null order by m.step desc limit 1
) as logged on true
where not r.imported and ($1::text is null or r.tenant_id = $1)
"""  # noqa: S608 - built from constants
_LIST = f"""
select * from ({_COLUMNS}) as found
where ($2 = '' or strpos(lower(run_id || ' ' || base_model || ' ' || tags::text), lower($2)) > 0)
  and ($3 = '' or status = $3)
  and ($4::timestamptz is null or (created_at, run_id) < ($4, $5))
order by created_at desc, run_id desc limit $6
"""  # noqa: S608 - built from constants
_ONE = _COLUMNS + " and r.run_id = $2"
# Rows of one step are one point; of a long run every n-th step is shown, and always the newest.
_SERIES = """
with bounds as (
  select greatest(1, ceil(max(step)::float8 / $3))::bigint as every, max(step) as last
  from run_metric where run_id = $1
)
select step, logged_at, metrics from run_metric, bounds
where run_id = $1 and step > $2 and (step % every = 0 or step = last)
order by step, logged_at
"""
_COST = """
select coalesce(sum(amount_nano_usd), 0)::bigint as nano_usd,
  coalesce(sum(quantity) filter (where kind = 'training'), 0)::bigint as trained,
  coalesce(sum(quantity) filter (where kind = 'completion'), 0)::bigint as sampled
from usage_run where run_id = $1 and tenant_id = $2
"""
_CHECKPOINTS = """
select checkpoint_id, mode, name, step, size_bytes, created_at, expires_at from checkpoint
where run_id = $1 and deleted_at is null and (expires_at is null or expires_at > now())
order by created_at desc limit 100
"""


@dataclass(frozen=True, slots=True)
class ShownRun:
    """A run; `metrics` are the trainer's newest of each name, and what the client has logged last."""

    run_id: str
    tenant_id: str
    tenant: str
    base_model: str
    lora: dict[str, Any]
    context_length: int
    created_at: datetime
    updated_at: datetime
    step: int
    metrics: dict[str, float]
    lost: str | None
    tags: dict[str, str]
    status: Status

    @property
    def loss(self) -> float | None:
        """The newest loss for each token."""
        return self.metrics.get("loss_mean")

    @property
    def reward(self) -> float | None:
        """The newest reward, where the client logs one."""
        names = [name for name in self.metrics if name.startswith("reward")]
        return self.metrics[min(names, key=len)] if names else None


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a run has used so far; tokens."""

    nano_usd: int
    trained: int
    sampled: int


async def list_runs(
    database: Database,
    tenant_id: str | None,
    *,
    search: str = "",
    status: str = "",
    before: ShownRun | None = None,
) -> list[ShownRun]:
    """The newest runs whose id, base model or tags contain `search`, at most `PAGE_RUNS`, older than `before`."""
    rows = await database.fetch(
        _LIST,
        tenant_id,
        search[:SEARCH_CHARS_MAX],
        status if status in STATUSES else "",
        before.created_at if before else None,
        before.run_id if before else None,
        PAGE_RUNS,
    )
    return [_run(row) for row in rows]


async def find_run(database: Database, tenant_id: str | None, run_id: str) -> ShownRun:
    """One run.

    Raises:
        NotFoundError: it is unknown, or another tenant's.
    """
    row = await database.fetchrow(_ONE, tenant_id, run_id)
    if row is None:
        raise NotFoundError(f"there is no run {run_id!r}")
    return _run(row)


async def run_cost(database: Database, run: ShownRun) -> RunCost:
    """What it has used and cost."""
    row = await database.fetchrow(_COST, run.run_id, run.tenant_id)
    assert row is not None
    return RunCost(row["nano_usd"], row["trained"], row["sampled"])


async def run_checkpoints(database: Database, run: ShownRun) -> list[Row]:
    """Its live checkpoints, newest first."""
    return list(await database.fetch(_CHECKPOINTS, run.run_id))


class Series(msgspec.Struct, frozen=True):
    """Columns of equal length: the steps, and each metric by its name with None where it was not logged."""

    step: list[int]
    metrics: dict[str, list[float | None]]


async def run_series(database: Database, run: ShownRun, *, after_step: int = -1) -> Series:
    """At most about `SERIES_STEPS_MAX` steps; `after_step` leaves out what is known already."""
    rows = await database.fetch(_SERIES, run.run_id, after_step, SERIES_STEPS_MAX)
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        points.setdefault(row["step"], {}).update(_metrics(row["metrics"]))
    names = sorted({name for point in points.values() for name in point})
    columns = {name: [point.get(name) for point in points.values()] for name in names}
    return Series(step=list(points), metrics=columns)


def _run(row: Row) -> ShownRun:
    values: dict[str, Any] = dict(row)
    logged = values.pop("logged")
    values["metrics"] = _metrics(values["metrics"]) | (_metrics(logged) if logged else {})
    for name in ("lora", "tags"):
        values[name] = _object(values[name])
    return ShownRun(**values)


def _object(value: object) -> dict[str, Any]:
    """A jsonb column, which comes as text."""
    return cast("dict[str, Any]", json.loads(value) if isinstance(value, str) else value)


def _metrics(value: object) -> dict[str, float]:
    """The numbers among what was logged."""
    found: Mapping[str, Any] = _object(value)
    return {
        name: float(number)
        for name, number in found.items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
