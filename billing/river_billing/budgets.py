"""Monthly budgets of tenants and keys, and the warnings that come before they end.

A month is a calendar month in UTC; usage counts to the month it occurred in. Budgets are enforced by the same holds and
leases as credit (see `leases`), so that they are never overdrawn by more than a price that changed meanwhile.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from river_billing import limits
from river_billing.database import Connection
from river_billing.errors import AmountError, UnknownAccountError
from river_client.credit_wire import Budget, BudgetWarning

logger = logging.getLogger("river.billing")

_SET_OF_TENANT = """
update tenant set monthly_budget_nano_usd = $2 where tenant_id = $1 returning tenant_id
"""
_SET_OF_KEY = """
update api_key set monthly_budget_nano_usd = $2 where key_id = $1 returning tenant_id
"""

_LIST = """
select * from budget where $1::text is null or tenant_id = $1 order by tenant_id, key_id
"""

_LIST_WARNINGS = """
select * from budget_warning where $1::text is null or tenant_id = $1
order by month desc, warned_at desc, percent desc limit $2
"""

# Numeric, because a hundred times the largest budget is no bigint.
_WARN = """
insert into budget_warning (tenant_id, key_id, month, percent, budget_nano_usd, spent_nano_usd)
select tenant_id, key_id, current_month(), percent, budget_nano_usd, spent_nano_usd
from budget cross join (values (80), (100)) as threshold (percent)
where tenant_id = any ($1::text[]) and spent_nano_usd > 0
  and spent_nano_usd::numeric * 100 >= budget_nano_usd::numeric * percent
order by tenant_id, key_id, percent
on conflict do nothing
returning *
"""

_WARN_OF_REFUSAL = """
insert into budget_warning (tenant_id, key_id, month, percent, budget_nano_usd, spent_nano_usd)
select tenant_id, key_id, current_month(), 100, budget_nano_usd, spent_nano_usd
from budget where tenant_id = $1 and key_id = $2
on conflict do nothing
returning *
"""


async def set_budget(
    connection: Connection,
    *,
    budget_nano_usd: int | None,
    tenant_id: str | None = None,
    key_id: str | None = None,
) -> str:
    """Sets or, with None, removes the monthly budget of a tenant or of a key; returns the tenant.

    Raises:
        AmountError: it is negative or absurdly high.
        UnknownAccountError: there is no such tenant or key.
    """
    assert (tenant_id is None) != (key_id is None), "a budget is of a tenant or of a key"
    if budget_nano_usd is not None and not 0 <= budget_nano_usd <= limits.AMOUNT_MAX_NANO_USD:
        raise AmountError(
            f"monthly_budget_nano_usd: {budget_nano_usd}, must be 0 to {limits.AMOUNT_MAX_NANO_USD}"
        )
    if tenant_id is not None:
        owner = await connection.fetchval(_SET_OF_TENANT, tenant_id, budget_nano_usd)
    else:
        owner = await connection.fetchval(_SET_OF_KEY, key_id, budget_nano_usd)
    if owner is None:
        what = f"key {key_id!r}" if tenant_id is None else f"tenant {tenant_id!r}"
        raise UnknownAccountError(f"there is no {what}")
    return owner


async def list_budgets(connection: Connection, tenant_id: str | None) -> list[Budget]:
    """The budgets of one tenant and its keys, or of all, with what this month has cost."""
    resets_at = next_month(dt.datetime.now(dt.UTC)).isoformat()
    return [
        Budget(
            tenant=row["tenant_id"],
            key_id=row["key_id"] or None,
            budget_nano_usd=row["budget_nano_usd"],
            spent_nano_usd=row["spent_nano_usd"],
            resets_at=resets_at,
        )
        for row in await connection.fetch(_LIST, tenant_id)
    ]


async def list_warnings(connection: Connection, tenant_id: str | None) -> list[BudgetWarning]:
    """The warnings of one tenant or of all, newest first."""
    rows = await connection.fetch(_LIST_WARNINGS, tenant_id, limits.WARNINGS_MAX)
    return [_warning(row) for row in rows]


async def warn_of_budgets(connection: Connection, tenants: Sequence[str]) -> list[BudgetWarning]:
    """Writes down which budgets have now been used to 80 or 100 %; returns those that were not known before."""
    return [_warning(row) for row in await connection.fetch(_WARN, list(tenants))]


async def warn_of_refusal(
    connection: Connection, tenant_id: str, key_id: str | None
) -> BudgetWarning | None:
    """Writes down that a budget refused a request; None when that is known already."""
    row = await connection.fetchrow(_WARN_OF_REFUSAL, tenant_id, key_id or "")
    return _warning(row) if row else None


def report_warning(warning: BudgetWarning) -> None:
    """Tells the operators, who may tell the tenant."""
    logger.warning(
        "%d %% of a monthly budget are used",
        warning.percent,
        extra={
            "tenant": warning.tenant,
            "key": warning.key_id,
            "budget_nano_usd": warning.budget_nano_usd,
            "spent_nano_usd": warning.spent_nano_usd,
        },
    )


def next_month(moment: dt.datetime) -> dt.datetime:
    """When the month of a moment ends, in UTC."""
    first = moment.astimezone(dt.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + dt.timedelta(days=32)).replace(day=1)


def _warning(row: Mapping[str, Any]) -> BudgetWarning:
    return BudgetWarning(
        tenant=row["tenant_id"],
        key_id=row["key_id"] or None,
        month=row["month"].isoformat()[:7],
        percent=row["percent"],
        budget_nano_usd=row["budget_nano_usd"],
        spent_nano_usd=row["spent_nano_usd"],
        warned_at=row["warned_at"].isoformat(),
    )
