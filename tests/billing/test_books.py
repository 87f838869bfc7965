"""The books against a model of ten lines: whatever is used, changed, repeated, late or killed, to the nano-dollar.

Time is of the test's own and lies in the future, so that prices can be set at any moment of it. Kills are real: the
connection is cut between two statements of the recorder, and Postgres rolls back what was begun.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.billing import add_tenant, database

from river_billing import limits
from river_billing.audit import find_differences
from river_billing.database import OUTAGES
from river_billing.events import (
    AnyEvent,
    RunAdvanced,
    UsageEvent,
    UsageKind,
    operation_id,
    training_event_id,
)
from river_billing.invoices import close_invoices
from river_billing.ledger import CREDIT_SOURCES, add_credit, set_billing
from river_billing.prices import set_price
from river_billing.recorder import record_events
from river_client.credit_wire import BillingMode, CreditKind
from river_ops.embedded.postgres import EmbeddedPostgres

EXAMPLES = 25
STEPS = 30
TENANTS = 2
TIER = 1024
BASE_MODEL = "books/model"
START = datetime(2090, 3, 15, 12, tzinfo=UTC)
KINDS = (UsageKind.PROMPT, UsageKind.CACHED_PROMPT, UsageKind.COMPLETION, UsageKind.TRAINING)

QUANTITIES = st.one_of(st.integers(0, 20), st.integers(0, 10**9))
PRICES = st.one_of(
    st.sampled_from([Decimal(0), Decimal("0.5"), Decimal("1.5"), Decimal("0.000000001")]),
    st.decimals(0, 10_000, places=9),
)
WHOSE = st.integers(0, TENANTS - 1)
CHOICE = st.integers(0, 10**6)


@dataclass
class Model:
    """What the books should say: balances by tenant and account, and usage by tenant and month."""

    billing: dict[str, str] = field(default_factory=dict[str, str])
    prices: dict[UsageKind, list[tuple[float, Decimal]]] = field(
        default_factory=dict[UsageKind, list[tuple[float, Decimal]]]
    )
    seen: set[str] = field(default_factory=set[str])
    balances: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    used: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])

    def record(self, event: UsageEvent) -> None:
        if event.event_id not in self.seen:
            self.seen.add(event.event_id)
            amount = sum(self.amount(kind, event) for kind in event.quantities)
            source = "credit" if self.billing[event.tenant_id] == "prepaid" else "receivable"
            self.move(event.tenant_id, source, "revenue", amount)
            self.used[
                event.tenant_id, f"{datetime.fromtimestamp(event.occurred_at, UTC):%Y-%m}"
            ] += amount

    def amount(self, kind: UsageKind, event: UsageEvent) -> int:
        price = [price for since, price in self.prices[kind] if since <= event.occurred_at][-1]
        return int((price * event.quantities[kind]).to_integral_value(ROUND_HALF_EVEN))

    def move(self, tenant: str, source: str, target: str, amount: int) -> None:
        self.balances[tenant, source] -= amount
        self.balances[tenant, target] += amount


class Mortal:
    """A connection that is cut before the statement (or the commit) of that number, or after the last commit."""

    def __init__(self, connection: Any, lives: int) -> None:
        self._connection = connection
        self._lives = lives
        self._depth = 0
        self.committed = False

    async def execute(self, query: str, *args: Any) -> Any:
        self._live()
        return await self._connection.execute(query, *args)

    async def fetch(self, query: str, *args: Any) -> Any:
        self._live()
        return await self._connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: Any) -> Any:
        self._live()
        return await self._connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        self._live()
        return await self._connection.fetchval(query, *args)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        async with self._connection.transaction():
            self._depth += 1
            yield
            self._live()
            self._depth -= 1
        if self._depth == 0:
            self.committed = True
            self._live()

    def _live(self) -> None:
        if self._lives == 0:
            self._connection.terminate()
            raise ConnectionResetError("killed")
        self._lives -= 1


class Books(RuleBasedStateMachine):
    """Users, an administrator and a recorder that is killed now and then, in any order."""

    cluster: EmbeddedPostgres
    template: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = f"books_{uuid.uuid4().hex}"
        self.administer(f"create database {self.database} template {self.template}")
        self.connection: Any = self.connect()
        self.now = START
        self.model = Model()
        self.stream: list[list[AnyEvent]] = []  # messages: an event, or what one operation tells
        self.sent: list[list[AnyEvent]] = []
        self.seqs: Counter[str] = Counter()
        self.closed: dict[str, date] = {}
        self.tenants = [f"ten_{number}" for number in range(TENANTS)]
        for tenant in self.tenants:
            self.do(self.add_run(tenant))
            self.model.billing[tenant] = "postpaid"
        for kind in KINDS:
            self.set_price(kind, Decimal("2.5"), datetime(2089, 1, 1, tzinfo=UTC))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def connect(self) -> Any:
        return self.do(asyncpg.connect(self.cluster.url(self.database)))

    def administer(self, statement: str) -> None:
        async def run() -> None:
            async with database(self.cluster.url()) as connection:
                await connection.execute(statement)

        self.do(run())

    async def add_run(self, tenant: str) -> None:
        await add_tenant(self.connection, tenant, key_id=f"key_{tenant}")
        await self.connection.execute(
            "insert into session (session_id, tenant_id, key_id) values ($1, $1, $2)",
            tenant,
            f"key_{tenant}",
        )
        await self.connection.execute(
            "insert into run (run_id, tenant_id, session_id, base_model, lora, context_length) "
            "values ($1, $1, $1, $2, '{}', $3)",
            tenant,
            BASE_MODEL,
            TIER,
        )

    # ---- Users ----

    @rule(
        whose=WHOSE,
        quantities=st.tuples(QUANTITIES, QUANTITIES, QUANTITIES),
        late_h=st.sampled_from([0, 0, 0, 1, 30, 700, 1500]),
    )
    def request(self, whose: int, quantities: tuple[int, int, int], late_h: int) -> None:
        """Its event comes now, or hours or months after it occurred."""
        event = self.event(
            self.tenants[whose],
            str(uuid.uuid4()),
            dict(zip(KINDS, quantities, strict=False)),
            late_h,
        )
        self.send([event])

    @rule(whose=WHOSE, tokens=QUANTITIES)
    def operation(self, whose: int, tokens: int) -> None:
        tenant = self.tenants[whose]
        self.seqs[tenant] += 1
        seq = self.seqs[tenant]
        event_id = training_event_id(operation_id(tenant, seq))
        advanced = RunAdvanced(run_id=tenant, seq=seq, step=seq, occurred_at=self.now.timestamp())
        self.send([self.event(tenant, event_id, {UsageKind.TRAINING: tokens}, 0), advanced])

    @precondition(lambda self: self.sent)
    @rule(choice=CHOICE)
    def retry(self, choice: int) -> None:
        """A sender that had no acknowledgement sends again, however long ago it was."""
        self.stream.append(self.sent[choice % len(self.sent)])

    def event(
        self, tenant: str, event_id: str, quantities: dict[UsageKind, int], late_h: int
    ) -> UsageEvent:
        return UsageEvent(
            event_id=event_id,
            occurred_at=(self.now - timedelta(hours=late_h)).timestamp(),
            tenant_id=tenant,
            key_id=f"key_{tenant}",
            base_model=BASE_MODEL,
            context_length=TIER,
            quantities=quantities,
        )

    def send(self, message: list[AnyEvent]) -> None:
        self.stream.append(message)
        self.sent.append(message)

    # ---- The recorder ----

    @precondition(lambda self: self.stream)
    @rule(
        count=st.integers(1, 8),
        order=CHOICE,
        lives=st.one_of(st.none(), st.integers(0, 8)),
    )
    def record(self, count: int, order: int, lives: int | None) -> None:
        """A batch, in any order; a recorder that is killed leaves it in the stream."""
        random.Random(order).shuffle(self.stream)
        batch = self.stream[:count]
        events = [event for message in batch for event in message]
        mortal = Mortal(self.connection, -1 if lives is None else lives)
        try:
            unknown = self.do(record_events(mortal, events))  # type: ignore[arg-type] - the part of it that is used
        except OUTAGES:
            self.connection = self.connect()
        else:
            assert unknown == []
            del self.stream[: len(batch)]
        if mortal.committed:
            for event in events:
                if isinstance(event, UsageEvent):
                    self.model.record(event)

    # ---- The administrator ----

    @rule(kind=st.sampled_from(KINDS), price=PRICES)
    def change_price(self, kind: UsageKind, price: Decimal) -> None:
        self.now += timedelta(seconds=1)
        self.set_price(kind, price, self.now)

    def set_price(self, kind: UsageKind, price: Decimal, since: datetime) -> None:
        change = set_price(
            self.connection,
            model=BASE_MODEL,
            context_length=TIER,
            kind=kind,
            nano_usd_per_unit=price,
            valid_from=since,
        )
        self.do(change)
        self.model.prices.setdefault(kind, []).append((since.timestamp(), price))

    @rule(
        whose=WHOSE,
        kind=st.sampled_from(sorted(CREDIT_SOURCES)),
        amount=st.integers(1, 10**12),
        times=st.integers(1, 2),
    )
    def add_credit(self, whose: int, kind: CreditKind, amount: int, times: int) -> None:
        tenant, reference = self.tenants[whose], uuid.uuid4().hex
        amount = -amount if kind == "adjustment" else amount
        for _ in range(times):
            self.do(
                add_credit(
                    self.connection,
                    tenant_id=tenant,
                    amount_nano_usd=amount,
                    reference=reference,
                    kind=kind,
                )
            )
        self.model.move(tenant, CREDIT_SOURCES[kind], "credit", amount)

    @rule(whose=WHOSE, billing=st.sampled_from(["prepaid", "postpaid"]))
    def bill(self, whose: int, billing: BillingMode) -> None:
        self.do(set_billing(self.connection, self.tenants[whose], billing))
        self.model.billing[self.tenants[whose]] = billing

    @rule(hours=st.sampled_from([1, 24, 400]))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @rule(whose=WHOSE)
    def close(self, whose: int) -> None:
        """Closes last month: then all invoices together say what was recorded of the months up to it."""
        tenant = self.tenants[whose]
        last = (self.now.replace(day=1) - timedelta(days=1)).date().replace(day=1)
        self.do(close_invoices(self.connection, tenant, last))
        told = self.do(
            self.connection.fetchval(
                "select coalesce(sum(amount_nano_usd), 0)::bigint from invoice where tenant_id = $1",
                tenant,
            )
        )
        used = sum(
            amount
            for (whom, month), amount in self.model.used.items()
            if whom == tenant and month <= f"{last:%Y-%m}"
        )
        # What is late for a month that is closed waits for the next.
        assert told <= used
        assert told == used or self.closed.get(tenant) == last
        self.closed[tenant] = last

    # ---- What must hold ----

    @invariant()
    def the_books_say_what_the_model_says(self) -> None:
        rows = self.do(
            self.connection.fetch(
                "select tenant_id, account, balance_nano_usd from ledger_balance where tenant_id = any ($1)",
                self.tenants,
            )
        )
        balances = {(row[0], row[1]): row[2] for row in rows if row[2]}
        assert balances == {key: amount for key, amount in self.model.balances.items() if amount}

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        assert self.do(find_differences(self.connection)).differences == []

    def teardown(self) -> None:
        """Whatever was left in the stream is recorded at last, and then there is nothing more to bill."""
        while self.stream:
            self.record(8, 1, None)
        self.the_books_say_what_the_model_says()
        self.the_audit_finds_nothing()
        seqs = self.do(
            self.connection.fetch(
                "select run_id, last_seq from run where run_id = any ($1)", self.tenants
            )
        )
        assert {row["run_id"]: max(row["last_seq"], 0) for row in seqs} == {
            tenant: self.seqs[tenant] for tenant in self.tenants
        }
        assert len(self.model.seen) == len(self.sent)
        self.do(self.connection.close())
        self.administer(f"drop database {self.database} with (force)")
        self.runner.close()


@pytest.mark.slow
def test_the_books_equal_the_model(
    postgres_cluster: EmbeddedPostgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests, operations, retries, kills, price changes, credit, billing modes, late events and invoices."""
    # The test's months are over when it says so.
    monkeypatch.setattr(limits, "INVOICE_GRACE_S", -200 * 366 * 86_400)
    # Each example has a database of its own, so that the audit sees nothing of the others.
    template = urlsplit(postgres_url).path.removeprefix("/")
    machine = type("PlacedBooks", (Books,), {"cluster": postgres_cluster, "template": template})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
