"""What pages show of the last half hour: curves, and the numbers of the last minutes by base model and status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from river_gateway.health.moments import total_of
from river_gateway.health.slots import SLOT_S, Outcome, Series, failed_share, outcomes, quantile_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_gateway.health.moments import Moment

POINT_SLOTS = 3
POINT_S = POINT_SLOTS * SLOT_S
RECENT_SLOTS = 6
RECENT_S = RECENT_SLOTS * SLOT_S


@dataclass(frozen=True, slots=True)
class Reading:
    """Requests of a stretch of time: how fast they came, by outcome and status, and how long they took, seconds."""

    name: str
    requests: int
    per_s: float
    failed_share: float | None
    by_outcome: dict[str, int]
    statuses: dict[int, int]
    first_p50_s: float | None
    first_p99_s: float | None
    whole_p50_s: float | None
    whole_p99_s: float | None


@dataclass(frozen=True, slots=True)
class Curves:
    """One value for each `POINT_S` seconds of the last half hour, the newest last; where there were none it is 0."""

    per_s: list[float]
    failed_percent: list[float]
    first_p50_ms: list[float]
    first_p99_ms: list[float]

    def rows(self) -> list[tuple[float, float, float, float]]:
        """The same as a table, newest first."""
        columns = (self.per_s, self.failed_percent, self.first_p50_ms, self.first_p99_ms)
        return list(zip(*columns, strict=True))[::-1]


@dataclass(frozen=True, slots=True)
class Readings:
    """`recent` is of the last minute and `half_hour` of all; `by_name` are the half hour's, busiest first."""

    gateways: int
    recent: Reading
    half_hour: Reading
    by_name: list[Reading]
    curves: Curves


def read(moments: Sequence[Moment]) -> Readings:
    """The readings of `SharedHealth.moments`."""
    whole = [_all_of([moment]) for moment in moments]
    points = [
        reading("", total_of(whole[start : start + POINT_SLOTS]), POINT_S)
        for start in range(0, len(whole), POINT_SLOTS)
    ]
    names = sorted({name for moment in moments for name in moment.series})
    kept_s = len(moments) * SLOT_S
    by_name = [
        reading(name, total_of([m.series[name] for m in moments if name in m.series]), kept_s)
        for name in names
    ]
    recent = moments[-RECENT_SLOTS:]
    return Readings(
        gateways=len({gateway for moment in recent for gateway in moment.gateways}),
        recent=reading("", total_of(whole[-RECENT_SLOTS:]), RECENT_S),
        half_hour=reading("", total_of(whole), kept_s),
        by_name=sorted(by_name, key=lambda each: -each.requests),
        curves=Curves(
            per_s=[point.per_s for point in points],
            failed_percent=[100 * (point.failed_share or 0.0) for point in points],
            first_p50_ms=[1e3 * (point.first_p50_s or 0.0) for point in points],
            first_p99_ms=[1e3 * (point.first_p99_s or 0.0) for point in points],
        ),
    )


def reading(name: str, series: Series, seconds: float) -> Reading:
    """What a series says of so many seconds."""
    by_outcome = outcomes(series.statuses)
    return Reading(
        name=name,
        requests=by_outcome.total(),
        per_s=by_outcome.total() / seconds,
        failed_share=failed_share(series.statuses),
        by_outcome={outcome.value: by_outcome[outcome] for outcome in Outcome},
        statuses=dict(sorted(series.statuses.items())),
        first_p50_s=quantile_s(series.first, 0.5),
        first_p99_s=quantile_s(series.first, 0.99),
        whole_p50_s=quantile_s(series.whole, 0.5),
        whole_p99_s=quantile_s(series.whole, 0.99),
    )


def _all_of(moments: Sequence[Moment]) -> Series:
    return total_of([series for moment in moments for series in moment.series.values()])
