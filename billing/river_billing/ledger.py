"""The books: what tenants paid, were given, used and owe, in double entry.

A transaction is a handful of amounts, by account, whose sum is zero: money flows from the accounts with negative
amounts into those with positive ones. The database refuses one that does not balance and any change of what is
written, and keeps the sums of each account with the entries; `ledger_differences` recomputes them. Usage is posted by
`usage`, in the transaction that records it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from river_billing import limits
from river_billing.database import Connection
from river_billing.errors import AmountError, ReferenceTakenError, UnknownAccountError
from river_client.credit_wire import BillingMode, Credit, CreditKind, CreditTransaction

CREDIT_SOURCES: Mapping[CreditKind, str] = {
    "top_up": "payments",
    "grant": "promotions",
    "adjustment": "adjustments",
}
"""The account that each kind of credit comes from."""

_LOCK = "select lock_tenants(array[$1])"

_BEGIN = """
insert into ledger_transaction (tenant_id, kind, reference, note, actor) values ($1, $2, $3, $4, $5)
on conflict (tenant_id, reference) do nothing
returning transaction_id
"""

_ENTER = """
insert into ledger_entry (transaction_id, tenant_id, account, amount_nano_usd)
values ($1, $2, $3, -$4::bigint), ($1, $2, 'credit', $4)
"""

_TRANSACTIONS = """
select t.*, jsonb_object_agg(e.account, e.amount_nano_usd) as entries
from ledger_transaction t join ledger_entry e using (transaction_id)
where t.tenant_id = $1 and t.transaction_id < coalesce($2, t.transaction_id + 1)
  and ($3::text is null or t.reference = $3)
group by t.transaction_id order by t.transaction_id desc limit $4
"""

_STANDING = """
select t.tenant_id, t.billing,
  coalesce((select balance_nano_usd from ledger_balance where tenant_id = $1 and account = 'credit'), 0)
    as balance,
  coalesce((select sum(amount_nano_usd) from reservation where tenant_id = $1), 0)::bigint as reserved,
  coalesce((select -balance_nano_usd from ledger_balance where tenant_id = $1 and account = 'receivable'), 0)
    as owed
from tenant t where t.tenant_id = $1
"""

_SET_BILLING = "update tenant set billing = $2 where tenant_id = $1 returning tenant_id"
_DIFFERENCES = "select * from ledger_differences() order by tenant_id, account"
_REBUILD = "select rebuild_ledger_balances()"


async def add_credit(
    connection: Connection,
    *,
    tenant_id: str,
    amount_nano_usd: int,
    reference: str,
    kind: CreditKind = "top_up",
    note: str | None = None,
    actor: str | None = None,
) -> CreditTransaction:
    """Books credit for a tenant, once for each `reference`: the same again returns the first booking.

    Raises:
        AmountError: the amount is zero, absurdly high, or negative and no adjustment.
        ReferenceTakenError: another amount or kind was booked under the reference.
        UnknownAccountError: there is no such tenant.
    """
    _check_amount(amount_nano_usd, kind)
    async with connection.transaction():
        await credit_of(connection, tenant_id)
        await connection.execute(_LOCK, tenant_id)
        transaction_id = await connection.fetchval(_BEGIN, tenant_id, kind, reference, note, actor)
        if transaction_id is not None:
            source = CREDIT_SOURCES[kind]
            await connection.execute(_ENTER, transaction_id, tenant_id, source, amount_nano_usd)
        booked = (await transactions(connection, tenant_id, reference=reference))[0]
    if (booked.kind, booked.amount_nano_usd) != (kind, amount_nano_usd):
        raise ReferenceTakenError(
            f"reference: {reference!r} is a {booked.kind} of {booked.amount_nano_usd} nano-dollars"
        )
    return booked


async def credit_of(connection: Connection, tenant_id: str) -> Credit:
    """How a tenant stands.

    Raises:
        UnknownAccountError: there is no such tenant.
    """
    row = await connection.fetchrow(_STANDING, tenant_id)
    if row is None:
        raise UnknownAccountError(f"there is no tenant {tenant_id!r}")
    return Credit(
        tenant=row["tenant_id"],
        billing=row["billing"],
        balance_nano_usd=row["balance"],
        reserved_nano_usd=row["reserved"],
        owed_nano_usd=row["owed"],
    )


async def transactions(
    connection: Connection,
    tenant_id: str,
    *,
    before: int | None = None,
    reference: str | None = None,
    count_max: int = limits.TRANSACTIONS_MAX,
) -> list[CreditTransaction]:
    """A tenant's transactions, newest first: those `before` an id, or that of a reference."""
    rows = await connection.fetch(_TRANSACTIONS, tenant_id, before, reference, count_max)
    return [_transaction(row) for row in rows]


async def set_billing(connection: Connection, tenant_id: str, billing: BillingMode) -> None:
    """Decides whether a tenant's credit bounds what it may use; what was booked before stays where it is.

    Raises:
        UnknownAccountError: there is no such tenant.
    """
    if await connection.fetchval(_SET_BILLING, tenant_id, billing) is None:
        raise UnknownAccountError(f"there is no tenant {tenant_id!r}")


async def ledger_differences(connection: Connection) -> list[tuple[str, str, int, int]]:
    """Where stored and recomputed sums differ: tenant, account, stored, recomputed nano-dollars. Empty is right."""
    return [
        (
            row["tenant_id"],
            row["account"],
            int(row["stored_nano_usd"]),
            int(row["recomputed_nano_usd"]),
        )
        for row in await connection.fetch(_DIFFERENCES)
    ]


async def rebuild_balances(connection: Connection) -> None:
    """Makes the stored sums what the entries say."""
    await connection.execute(_REBUILD)


def _check_amount(amount_nano_usd: int, kind: CreditKind) -> None:
    least = -limits.AMOUNT_MAX_NANO_USD if kind == "adjustment" else 1
    if amount_nano_usd == 0 or not least <= amount_nano_usd <= limits.AMOUNT_MAX_NANO_USD:
        raise AmountError(
            f"amount_nano_usd: {amount_nano_usd}, a {kind} is from {least} "
            f"to {limits.AMOUNT_MAX_NANO_USD} and never 0"
        )


def _transaction(row: Mapping[str, Any]) -> CreditTransaction:
    entries: dict[str, int] = json.loads(row["entries"])
    return CreditTransaction(
        transaction_id=row["transaction_id"],
        tenant=row["tenant_id"],
        kind=row["kind"],
        amount_nano_usd=entries.get("credit", 0) + entries.get("receivable", 0),
        created_at=row["created_at"].isoformat(),
        entries=entries,
        reference=row["reference"],
        note=row["note"],
        actor=row["actor"],
    )
