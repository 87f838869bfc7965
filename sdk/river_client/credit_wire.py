"""The structs of credit and budgets under `/river/v1`. Money is nano-dollars (1e-9 USD), times are ISO 8601."""

from __future__ import annotations

from typing import Literal

from river_client.wire import Wire

BillingMode = Literal["postpaid", "prepaid"]
CreditKind = Literal["top_up", "grant", "adjustment"]


class Credit(Wire, frozen=True):
    """How a tenant stands.

    `balance_nano_usd` is its credit, of which `reserved_nano_usd` is set aside for work in progress; `owed_nano_usd` is
    what it used without credit. Only the use of a `prepaid` tenant is bounded by its credit.
    """

    tenant: str
    billing: BillingMode
    balance_nano_usd: int = 0
    reserved_nano_usd: int = 0
    owed_nano_usd: int = 0


class AddCredit(Wire, frozen=True):
    """A `top_up` was paid for, a `grant` is a present; only an `adjustment` may be negative.

    The same `reference` is booked once for a tenant, however often it is sent.
    """

    tenant: str
    amount_nano_usd: int
    reference: str
    kind: CreditKind = "top_up"
    note: str | None = None


class SetBilling(Wire, frozen=True):
    tenant: str
    billing: BillingMode


class CreditTransaction(Wire, frozen=True):
    """One booking. `amount_nano_usd` is what it did to the tenant: above zero gave, below zero took.

    `entries` are the amounts by account, whose sum is zero: money flows from the negative into the positive ones.
    """

    transaction_id: int
    tenant: str
    kind: str
    amount_nano_usd: int
    created_at: str
    entries: dict[str, int]
    reference: str | None = None
    note: str | None = None
    actor: str | None = None


class CreditTransactions(Wire, frozen=True):
    """Newest first; the next page is that `before` the last transaction's id."""

    transactions: list[CreditTransaction]


class SetBudget(Wire, frozen=True):
    """A budget for a calendar month (UTC), of a tenant or of one of its keys; none takes it away."""

    monthly_budget_nano_usd: int | None
    tenant: str | None = None
    key_id: str | None = None


class Budget(Wire, frozen=True):
    """A budget of a key, or without `key_id` of its tenant, and what this month has cost."""

    tenant: str
    budget_nano_usd: int
    spent_nano_usd: int
    resets_at: str
    key_id: str | None = None


class BudgetWarning(Wire, frozen=True):
    """A budget had been used to `percent`, or at 100 refused a request. Comes once a month for each."""

    tenant: str
    month: str
    percent: int
    budget_nano_usd: int
    spent_nano_usd: int
    warned_at: str
    key_id: str | None = None


class Budgets(Wire, frozen=True):
    budgets: list[Budget]
    warnings: list[BudgetWarning]
