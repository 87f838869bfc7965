"""The structs of usage over time, `/river/v1/usage/series`. Money is nano-dollars (1e-9 USD), times are ISO 8601."""

from __future__ import annotations

from typing import Literal, get_args

from river_client.wire import Wire

Every = Literal["hour", "day"]
Dimension = Literal["model", "tier", "key", "user", "run"]
"""What usage can be told apart by, besides its time, tenant and kind."""

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
DEFAULT_GROUP: tuple[Dimension, ...] = ("model", "tier")


class UsageRow(Wire, frozen=True):
    """What one group used of one kind in the hour or day (UTC) that begins at `period`.

    The fields of what usage is not told apart by are absent, as are `user` and `run` of usage that has none. `quantity`
    is tokens, or kilobyte-hours of storage. `tier` is the context length that was opened.
    """

    period: str
    tenant: str
    kind: str
    quantity: int
    amount_nano_usd: int
    events: int
    model: str | None = None
    tier: int | None = None
    key: str | None = None
    user: str | None = None
    run: str | None = None


class UsageSeries(Wire, frozen=True):
    """Rows in the order of time, tenant and group; the next page is that `after` `next`, if there is one."""

    rows: list[UsageRow]
    next: str | None = None
