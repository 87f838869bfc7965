"""Usage by day for the pictures and tables of the dashboard, from the rollup by hour, so that it is what is billed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_gateway.database import Database

Told = Literal["model", "kind", "key"]
Measure = Literal["dollars", "tokens"]
TOLD: tuple[Told, ...] = get_args(Told)
MEASURES: tuple[Measure, ...] = get_args(Measure)
DAYS = (7, 30, 90)
SHOWN_MAX = 7
OTHERS = "all others"
CHART_WIDTH, CHART_HEIGHT = 960.0, 200.0

_COLUMNS: Mapping[Told, str] = {"model": "base_model", "kind": "kind", "key": "key_id"}
_BY_DAY = """
select date_trunc('day', hour, 'UTC') as day, {column} as name,
  coalesce(sum(quantity) filter (where kind <> 'storage'), 0)::bigint as tokens,
  sum(amount_nano_usd)::bigint as nano_usd
from usage_hour
where ($1::text is null or tenant_id = $1) and hour >= $2
group by 1, 2
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a day's bar in the picture, from its top left corner; `series` is a colour's number from 1 on."""

    x: float
    y: float
    width: float
    height: float
    series: int
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """One name's use in the whole time."""

    name: str
    series: int
    tokens: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class Spending:
    """Days in their order, UTC, the running one last; a value for each group and day."""

    days: list[datetime]
    groups: list[Group]
    tokens: dict[str, list[int]]
    nano_usd: dict[str, list[int]]

    @property
    def total_nano_usd(self) -> int:
        """What all of it costs."""
        return sum(group.nano_usd for group in self.groups)

    @property
    def total_tokens(self) -> int:
        """Tokens of all kinds."""
        return sum(group.tokens for group in self.groups)

    def bars(self, measure: Measure) -> list[Bar]:
        """Stacked bars in a box of `CHART_WIDTH` by `CHART_HEIGHT`, the first group at the bottom."""
        values = self.nano_usd if measure == "dollars" else self.tokens
        top = max((sum(column) for column in zip(*values.values(), strict=True)), default=0)
        if top == 0:
            return []
        step = CHART_WIDTH / len(self.days)
        bars: list[Bar] = []
        for number, day in enumerate(self.days):
            bottom = CHART_HEIGHT
            for group in self.groups:
                value = values[group.name][number]
                height = value / top * CHART_HEIGHT
                bottom -= height
                if value:
                    shown = f"${value / 1e9:,.4g}" if measure == "dollars" else f"{value:,} tokens"
                    text = f"{day:%Y-%m-%d} {group.name}: {shown}"
                    x, width = number * step + step * 0.1, step * 0.8
                    bars.append(Bar(x, bottom, width, height, group.series, text))
        return bars


async def read_spending(
    database: Database,
    tenant_id: str | None,
    *,
    days: int,
    told: Told,
    now: datetime | None = None,
) -> Spending:
    """The last `days` days, told apart by `told`: the `SHOWN_MAX` costliest by name, the others as one."""
    today = (now or datetime.now(UTC)).replace(hour=0, minute=0, second=0, microsecond=0)
    every_day = [today - timedelta(days=ago) for ago in reversed(range(days))]
    statement = _BY_DAY.format(column=_COLUMNS[told])
    rows = await database.fetch(statement, tenant_id, every_day[0])
    costs: dict[str, tuple[int, int]] = {}
    for row in rows:
        nano_usd, tokens = costs.get(row["name"], (0, 0))
        costs[row["name"]] = nano_usd + row["nano_usd"], tokens + row["tokens"]
    ranked = sorted(costs, key=lambda name: (costs[name], name), reverse=True)
    shown = ranked if len(ranked) <= SHOWN_MAX + 1 else [*ranked[:SHOWN_MAX], OTHERS]
    positions = {day: number for number, day in enumerate(every_day)}
    tokens_by = {name: [0] * days for name in shown}
    nano_usd_by = {name: [0] * days for name in shown}
    for row in rows:
        position = positions.get(row["day"])
        name = row["name"] if row["name"] in tokens_by else OTHERS
        if position is not None:  # Else it is ahead of our clock.
            tokens_by[name][position] += row["tokens"]
            nano_usd_by[name][position] += row["nano_usd"]
    groups = [
        Group(name, number, sum(tokens_by[name]), sum(nano_usd_by[name]))
        for number, name in enumerate(shown, start=1)
    ]
    return Spending(every_day, groups, tokens_by, nano_usd_by)
