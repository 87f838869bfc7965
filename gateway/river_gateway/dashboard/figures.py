"""What the overview says: tokens, money and activity, of one tenant or (None) of all, from the rollups by hour."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from river_gateway.database import Database

SPARK_HOURS = 48
RECENT_S = 60.0
ACTIVE_S = 60.0

# Sums of the hours since the beginning of last month, by period; one hour may be in several.
_SUMS = """
select kind,
  sum(quantity) filter (where hour >= $2)::bigint as today,
  sum(quantity) filter (where hour >= $3)::bigint as month,
  coalesce(sum(amount_nano_usd) filter (where hour >= $2), 0)::bigint as today_nano_usd,
  coalesce(sum(amount_nano_usd) filter (where hour >= $4 and hour < $2), 0)::bigint as yesterday_nano_usd,
  coalesce(sum(amount_nano_usd) filter (where hour >= $3), 0)::bigint as month_nano_usd,
  coalesce(sum(amount_nano_usd) filter (where hour < $3), 0)::bigint as last_month_nano_usd
from usage_hour
where ($1::text is null or tenant_id = $1) and hour >= $5
group by kind
"""
_BY_HOUR = """
select hour,
  coalesce(sum(quantity) filter (where kind = any($3)), 0)::bigint as tokens,
  sum(amount_nano_usd)::bigint as nano_usd,
  coalesce(sum(events) filter (where kind = 'completion'), 0)::bigint as requests,
  coalesce(sum(quantity) filter (where kind = 'training'), 0)::bigint as trained
from usage_hour
where ($1::text is null or tenant_id = $1) and hour >= $2
group by hour
"""
_RECENT = """
select count(*) filter (where kind = 'completion') as requests,
  coalesce(sum(quantity) filter (where kind = 'training'), 0)::bigint as trained
from usage_event
where ($1::text is null or tenant_id = $1) and occurred_at >= $2
"""
_ACTIVE_RUNS = """
select count(*) from run
where ($1::text is null or tenant_id = $1) and updated_at >= $2 and lost is null and not imported
"""

TOKEN_KINDS = ("prompt", "cached_prompt", "completion", "training")


@dataclass(slots=True)
class Hourly:
    """One value for each of the last `SPARK_HOURS` hours, the running one last."""

    tokens: list[float] = field(default_factory=list[float])
    nano_usd: list[float] = field(default_factory=list[float])
    requests: list[float] = field(default_factory=list[float])
    trained: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class Overview:
    """`today` and `month` are quantities by kind of usage; days and months are those of UTC."""

    today: dict[str, int]
    month: dict[str, int]
    today_nano_usd: int
    yesterday_nano_usd: int
    month_nano_usd: int
    last_month_nano_usd: int
    requests_per_s: float
    trained_per_s: float
    active_runs: int
    hourly: Hourly

    @property
    def tokens_today(self) -> int:
        """Tokens of all kinds."""
        return sum(self.today.get(kind, 0) for kind in TOKEN_KINDS)

    @property
    def tokens_this_month(self) -> int:
        """Tokens of all kinds."""
        return sum(self.month.get(kind, 0) for kind in TOKEN_KINDS)


async def read_overview(
    database: Database, tenant_id: str | None, *, now: datetime | None = None
) -> Overview:
    """The figures as they are now."""
    now = now or datetime.now(UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    today = hour.replace(hour=0)
    month = today.replace(day=1)
    last_month = (month - timedelta(days=1)).replace(day=1)
    since = min(last_month, today - timedelta(days=1))
    sums = await database.fetch(_SUMS, tenant_id, today, month, today - timedelta(days=1), since)
    first_hour = hour - timedelta(hours=SPARK_HOURS - 1)
    hours = await database.fetch(_BY_HOUR, tenant_id, first_hour, list(TOKEN_KINDS))
    recent = await database.fetchrow(_RECENT, tenant_id, now - timedelta(seconds=RECENT_S))
    assert recent is not None
    active = await database.fetchval(_ACTIVE_RUNS, tenant_id, now - timedelta(seconds=ACTIVE_S))
    by_hour = {row["hour"]: row for row in hours}
    hourly = Hourly()
    for number in range(SPARK_HOURS):
        row = by_hour.get(first_hour + timedelta(hours=number))
        for name in Hourly.__slots__:
            getattr(hourly, name).append(float(row[name]) if row else 0.0)
    return Overview(
        today={row["kind"]: row["today"] or 0 for row in sums},
        month={row["kind"]: row["month"] or 0 for row in sums},
        today_nano_usd=sum(row["today_nano_usd"] for row in sums),
        yesterday_nano_usd=sum(row["yesterday_nano_usd"] for row in sums),
        month_nano_usd=sum(row["month_nano_usd"] for row in sums),
        last_month_nano_usd=sum(row["last_month_nano_usd"] for row in sums),
        requests_per_s=recent["requests"] / RECENT_S,
        trained_per_s=recent["trained"] / RECENT_S,
        active_runs=active,
        hourly=hourly,
    )
