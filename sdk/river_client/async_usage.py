"""What was used: sums over a period, by hour or day as rows, or all of that as CSV."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import TypedDict, Unpack

from river_client import limits, wire
from river_client.transport import MSGPACK, Transport
from river_client.usage_wire import DEFAULT_GROUP, Dimension, Every, UsageRow, UsageSeries

_SERIES = "/usage/series"


class UsageOptions(TypedDict, total=False):
    """Which usage, and what rows are told apart by; `tenant` is for admins: a tenant, by id or name, or `*` for all."""

    every: Every
    group: Sequence[Dimension]
    since: datetime | None
    until: datetime | None
    tenant: str | None


async def usage_sums(
    transport: Transport, since: datetime | None, until: datetime | None, tenant: str | None
) -> list[wire.UsageLine]:
    """Sums per tenant, model, kind and context length."""
    params = _period(since, until, tenant)
    page = await transport.call("GET", "/usage", wire.Page, params=params)
    return page.usage or []


async def usage_rows(
    transport: Transport, **asked: Unpack[UsageOptions]
) -> AsyncGenerator[UsageRow]:
    """Rows in the order of time, read a page at a time."""
    params = _params(asked) | {"limit": str(limits.USAGE_PAGE_ROWS)}
    while True:
        page = await transport.call("GET", _SERIES, UsageSeries, params=params)
        for row in page.rows:
            yield row
        if page.next is None:
            return
        params["after"] = page.next


async def usage_csv(transport: Transport, **asked: Unpack[UsageOptions]) -> AsyncGenerator[str]:
    """The same as CSV, in pieces of text as they come."""
    async with transport.stream(
        "GET",
        wire.API_PREFIX + _SERIES,
        headers={"accept": f"text/csv, {MSGPACK};q=0.1"},  # the second for what goes wrong
        params=_params(asked) | {"format": "csv"},
    ) as response:
        async for text in response.aiter_text():
            yield text


def _params(asked: UsageOptions) -> dict[str, str]:
    params = _period(asked.get("since"), asked.get("until"), asked.get("tenant"))
    params["every"] = asked.get("every", "day")
    params["group"] = ",".join(asked.get("group", DEFAULT_GROUP))
    return params


def _period(since: datetime | None, until: datetime | None, tenant: str | None) -> dict[str, str]:
    """Times without a zone are local."""
    params: dict[str, str] = {}
    for name, moment in (("since", since), ("until", until)):
        if moment is not None:
            params[name] = moment.astimezone().isoformat()
    if tenant is not None:
        params["tenant"] = tenant
    return params
