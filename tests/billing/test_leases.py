"""Money set aside before work begins: whatever happens in whatever order, never more than there is."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import asyncpg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.billing import add_run, add_tenant, database, make_event

from river_billing import limits
from river_billing.budgets import list_budgets, list_warnings
from river_billing.events import UsageEvent, UsageKind
from river_billing.leases import Lease, end_holds, note_progress, place_hold, renew
from river_billing.ledger import add_credit, credit_of, ledger_differences
from river_billing.prices import set_price
from river_billing.recorder import record_events

UNIT = "unit/model"
GATEWAYS = 3
AMOUNTS = st.integers(1, 10**8)
TOP_UPS = st.integers(1, 10**7)


async def price_units(connection: Any) -> None:
    """A model whose tokens cost one nano-dollar each, so that quantities are amounts."""
    await set_price(
        connection,
        model=UNIT,
        context_length=1024,
        kind=UsageKind.COMPLETION,
        nano_usd_per_unit=Decimal(1),
    )


def unit_event(
    lease: Lease | None, amount: int, tenant_id: str, event_id: str | None = None
) -> UsageEvent:
    """The event of a request that cost `amount`, settled with its lease."""
    return UsageEvent(
        event_id=event_id or str(uuid.uuid4()),
        occurred_at=4_000_000_000.0,  # a price set just now is in force
        tenant_id=tenant_id,
        key_id="key",
        base_model=UNIT,
        context_length=1024,
        quantities={UsageKind.COMPLETION: amount},
        lease_id=None if lease is None else str(lease.lease_id),
        reserved_nano_usd=0 if lease is None else amount,
    )


_BEHIND = "update recorder_progress set recorded_until = now() - interval '2 minutes'"
# A minute ago, or after what the recorder has caught up with: one that ended before that has no event left to record.
_EXPIRE = """
update credit_lease
set expires_at = greatest(
  now() - interval '1 minute', (select recorded_until + interval '1 microsecond' from recorder_progress)
)
where lease_id = any ($1)
"""


class LosingAnswers:
    """A connection whose statements are carried out and whose answers get lost."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetchrow(self, query: str, *args: Any) -> Any:
        await self._connection.fetchrow(query, *args)
        raise TimeoutError


@dataclass
class World:
    """The model: what was admitted, settled, recorded. All of one prepaid tenant."""

    credit: int = 0
    recorded: int = 0
    open: list[tuple[Lease, int]] = field(default_factory=list)
    stream: list[UsageEvent] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    old: list[UsageEvent] = field(default_factory=list)

    @property
    def committed(self) -> int:
        """What everything admitted may cost, recorded or not."""
        return (
            self.recorded
            + sum(amount for _, amount in self.open)
            + sum(sum(event.quantities.values()) for event in self.stream)
            + sum(self.operations.values())
        )


class Machine(RuleBasedStateMachine):
    """Gateways, a recorder and an administrator, in any order, with crashes and lost answers."""

    postgres_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connection: Any = self.do(asyncpg.connect(self.postgres_url))
        self.tenant_id = f"ten_{uuid.uuid4().hex}"
        self.do(add_tenant(self.connection, self.tenant_id, billing="prepaid"))
        self.do(self.connection.execute(_BEHIND))
        self.world = World()
        self.leases = [self.new_lease() for _ in range(GATEWAYS)]
        self.dead: list[Lease] = []
        self.top_up(10**8)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def new_lease(self) -> Lease:
        return Lease(tenant_id=self.tenant_id, key_id="key")

    @rule(amount=TOP_UPS)
    def top_up(self, amount: int) -> None:
        reference = uuid.uuid4().hex
        for _ in range(2):
            self.do(
                add_credit(
                    self.connection,
                    tenant_id=self.tenant_id,
                    amount_nano_usd=amount,
                    reference=reference,
                )
            )
        self.world.credit += amount

    @rule(gateway=st.integers(0, GATEWAYS - 1), amount=AMOUNTS)
    def request(self, gateway: int, amount: int) -> None:
        """Admitted from memory where it can be, as a gateway does."""
        lease = self.leases[gateway]
        if not lease.hold(amount):
            self.do(renew(self.connection, lease, needed_nano_usd=amount))
            if not lease.hold(amount):
                return
        self.world.open.append((lease, amount))

    @precondition(lambda self: self.world.open)
    @rule(choice=st.integers(0, 10**6), share=st.fractions(0, 1))
    def finish(self, choice: int, share: Any) -> None:
        lease, held = self.world.open.pop(choice % len(self.world.open))
        used = int(held * share)
        lease.settle(held, used)
        if used:
            self.world.stream.append(unit_event(lease, used, self.tenant_id))

    @rule(amount=AMOUNTS)
    def submit_operation(self, amount: int) -> None:
        event_id = str(uuid.uuid4())
        for _ in range(2):
            refused = self.do(self.place(event_id, amount))
            if refused is None:
                self.world.operations[event_id] = amount
            else:
                assert refused.bound == "credit"
                assert refused.room_nano_usd < amount

    async def place(self, event_id: str, amount: int) -> Any:
        return await place_hold(
            self.connection,
            event_id=event_id,
            tenant_id=self.tenant_id,
            key_id="key",
            amount_nano_usd=amount,
            run_id="run_0",
            seq=1,
        )

    @precondition(lambda self: self.world.operations)
    @rule(choice=st.integers(0, 10**6), succeeds=st.booleans())
    def finish_operation(self, choice: int, succeeds: bool) -> None:
        event_id = sorted(self.world.operations)[choice % len(self.world.operations)]
        amount = self.world.operations.pop(event_id)
        if succeeds:
            self.world.stream.append(unit_event(None, amount, self.tenant_id, event_id))
        self.do(end_holds(self.connection, [event_id]))

    @precondition(lambda self: self.world.stream)
    @rule(count=st.integers(1, 5))
    def record(self, count: int) -> None:
        batch, self.world.stream = self.world.stream[:count], self.world.stream[count:]
        self.do(record_events(self.connection, [*batch, *self.world.old[-3:], *batch[:1]]))
        self.world.recorded += sum(sum(event.quantities.values()) for event in batch)
        self.world.old += batch

    @rule(gateway=st.integers(0, GATEWAYS - 1), close=st.booleans())
    def renew_in_background(self, gateway: int, close: bool) -> None:
        self.do(renew(self.connection, self.leases[gateway], close=close))

    @rule(gateway=st.integers(0, GATEWAYS - 1), needed=st.one_of(st.just(0), AMOUNTS))
    def lose_the_answer(self, gateway: int, needed: int) -> None:
        try:
            self.do(
                renew(LosingAnswers(self.connection), self.leases[gateway], needed_nano_usd=needed)  # type: ignore[arg-type]
            )
        except TimeoutError:
            return
        raise AssertionError("the answer was not lost")

    @precondition(lambda self: len(self.world.open) > 3)
    @rule(gateway=st.integers(0, GATEWAYS - 1))
    def crash(self, gateway: int) -> None:
        lease = self.leases[gateway]
        self.world.open = [one for one in self.world.open if one[0] is not lease]
        self.dead.append(lease)
        self.leases[gateway] = self.new_lease()

    @precondition(lambda self: self.dead)
    @rule()
    def let_dead_leases_expire(self) -> None:
        self.do(self.connection.execute(_EXPIRE, [lease.lease_id for lease in self.dead]))

    @precondition(lambda self: self.dead and not self.world.stream)
    @rule()
    def catch_up(self) -> None:
        self.do(self.note_caught_up())

    async def note_caught_up(self) -> None:
        await note_progress(self.connection, await self.connection.fetchval("select now()"))

    async def room(self) -> int:
        return await self.connection.fetchval(
            "select room_nano_usd from spending_bounds($1, 'key')", self.tenant_id
        )

    @invariant()
    def nothing_is_admitted_twice(self) -> None:
        room = self.do(self.room())
        promised = sum(lease.free_nano_usd for lease in self.leases) + room
        assert room >= 0
        assert self.world.committed + promised <= self.world.credit
        standing = self.do(credit_of(self.connection, self.tenant_id))
        assert standing.balance_nano_usd == self.world.credit - self.world.recorded
        assert all(lease.free_nano_usd >= 0 for lease in self.leases)

    def teardown(self) -> None:
        """When all work is done, everything set aside is free again: nothing leaks either."""
        while self.world.open:
            self.finish(0, 1)
        self.do(record_events(self.connection, self.world.stream))
        self.world.recorded += sum(sum(event.quantities.values()) for event in self.world.stream)
        self.world.stream = []
        self.do(end_holds(self.connection, list(self.world.operations)))
        for lease in self.leases:
            self.do(renew(self.connection, lease, close=True))
        self.do(
            self.connection.execute(
                "update credit_hold set expires_at = now() - interval '1 minute' where tenant_id = $1",
                self.tenant_id,
            )
        )
        self.let_dead_leases_expire()
        self.do(self.note_caught_up())
        assert self.do(self.room()) == self.world.credit - self.world.recorded
        assert [
            one for one in self.do(ledger_differences(self.connection)) if one[0] == self.tenant_id
        ] == []
        self.do(self.connection.close())
        self.runner.close()


def test_no_order_of_events_admits_too_much_or_leaks(postgres_url: str) -> None:
    """Requests, operations, records, replays, crashes, lost answers and top-ups against a model of sums."""

    async def prepare() -> None:
        async with database(postgres_url) as connection:
            await price_units(connection)

    asyncio.run(prepare())
    machine = type("PlacedMachine", (Machine,), {"postgres_url": postgres_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


async def funded(connection: Any, amount_nano_usd: int) -> None:
    """The prepaid tenant ten_a with that credit."""
    await add_tenant(connection, billing="prepaid", key_id="key")
    await add_credit(connection, tenant_id="ten_a", amount_nano_usd=amount_nano_usd, reference="r")


async def test_concurrent_holds_admit_exactly_what_there_is(
    connection: Any, postgres_url: str
) -> None:
    """400 gateways ask at once for a request each, with little credit for 100: exactly 100 are admitted."""
    price, count = 10**4, 100
    await funded(connection, price * count)
    connections = [await asyncpg.connect(postgres_url) for _ in range(8)]

    async def ask(own: Any) -> int:
        admitted = 0
        for _ in range(50):
            lease = Lease(tenant_id="ten_a", key_id="key")
            await renew(own, lease, needed_nano_usd=price)
            admitted += lease.hold(price)
        return admitted

    admitted = await asyncio.gather(*(ask(own) for own in connections))
    for own in connections:
        await own.close()
    assert price * count * limits.LEASE_SHARE < limits.LEASE_SLICE_MIN_NANO_USD, (
        "slices strand some"
    )
    assert sum(admitted) == count


async def test_operations_are_held_exactly(connection: Any, postgres_url: str) -> None:
    """400 operations at once against credit for 100, over eight connections: exactly 100 are accepted."""
    await funded(connection, 100)
    connections = [await asyncpg.connect(postgres_url) for _ in range(8)]

    async def submit(own: Any) -> int:
        accepted = 0
        for _ in range(50):
            refused = await place_hold(
                own,
                event_id=str(uuid.uuid4()),
                tenant_id="ten_a",
                key_id="key",
                amount_nano_usd=1,
                run_id="run_0",
                seq=1,
            )
            accepted += refused is None
        return accepted

    accepted = await asyncio.gather(*(submit(own) for own in connections))
    for own in connections:
        await own.close()
    assert sum(accepted) == 100


async def test_a_slice_is_small_and_shrinks_with_the_credit(connection: Any) -> None:
    """A gateway never strands more than a twentieth of the credit, a dollar at most, and below a floor nothing."""
    await funded(connection, 100 * 10**9)
    lease = Lease(tenant_id="ten_a", key_id="key")
    await renew(connection, lease)
    assert lease.free_nano_usd == 10**9
    other = Lease(tenant_id="ten_a", key_id="key")
    await renew(connection, other, needed_nano_usd=95 * 10**9)
    assert other.hold(95 * 10**9)
    for _ in range(2):
        await renew(connection, lease)
    assert lease.slice_nano_usd == 5 * 10**9 // 20
    assert lease.free_nano_usd <= 2 * lease.slice_nano_usd
    await renew(connection, other, needed_nano_usd=5 * 10**9)
    await renew(connection, lease, close=True)
    assert lease.free_nano_usd == 0


async def test_a_dead_gateways_lease_is_free_only_when_its_events_are_recorded(
    connection: Any,
) -> None:
    """Its end alone is not enough: what it published may still wait in the stream."""
    await price_units(connection)
    await funded(connection, 100)
    lease = Lease(tenant_id="ten_a", key_id="key")
    await renew(connection, lease, needed_nano_usd=100)
    assert lease.hold(100)
    lease.settle(100, 60)
    event = unit_event(lease, 60, "ten_a")
    await connection.execute("update credit_lease set expires_at = now() - interval '1 minute'")
    await connection.execute(
        "update recorder_progress set recorded_until = now() - interval '2 minutes'"
    )

    async def room() -> int:
        return await connection.fetchval(
            "select room_nano_usd from spending_bounds('ten_a', 'key')"
        )

    assert await room() == 0
    await record_events(connection, [event])
    assert await room() == 0
    await note_progress(connection, await connection.fetchval("select now()"))
    assert await room() == 40


async def test_a_late_renewal_changes_nothing(connection: Any) -> None:
    """One that a lost connection left behind on the server comes after its successor and is ignored."""
    await funded(connection, 100)
    lease = Lease(tenant_id="ten_a", key_id="key")
    await renew(connection, lease, needed_nano_usd=60)
    late = "select * from renew_lease($1, 0, 'ten_a', 'key', 0, 0, 0, '1 hour', 0, 0, 1)"
    assert await connection.fetchrow(late, lease.lease_id) is None
    assert await connection.fetchval("select granted_nano_usd from credit_lease") == 60


async def test_the_tightest_bound_decides(connection: Any) -> None:
    """Credit, the tenant's budget and the key's all bound a lease, and the smallest room is told."""
    await add_tenant(
        connection, billing="prepaid", budget_nano_usd=500, key_id="key", key_budget_nano_usd=100
    )
    await add_credit(connection, tenant_id="ten_a", amount_nano_usd=300, reference="r")
    mine, other = Lease(tenant_id="ten_a", key_id="key"), Lease(tenant_id="ten_a", key_id="key_2")
    await renew(connection, mine, needed_nano_usd=1000)
    assert (mine.free_nano_usd, mine.tightest and mine.tightest.bound) == (100, "key_budget")
    await renew(connection, other, needed_nano_usd=1000)
    assert (other.free_nano_usd, other.tightest and other.tightest.bound) == (200, "credit")
    free = Lease(tenant_id="ten_b", key_id="key")
    await add_tenant(connection, "ten_b")
    await renew(connection, free, needed_nano_usd=1000)
    assert free.tightest is None


async def test_an_operation_done_before_is_not_held_again(connection: Any) -> None:
    """A client that sends a finished operation once more pays nothing and has nothing set aside."""
    await add_run(connection)
    await connection.execute("update tenant set billing = 'prepaid'")
    await add_credit(connection, tenant_id="ten_a", amount_nano_usd=10, reference="r")
    await connection.execute("update run set last_seq = 4")
    for seq, held in ((4, 0), (5, 1)):
        await place_hold(
            connection,
            event_id=str(uuid.uuid4()),
            tenant_id="ten_a",
            key_id="key_1",
            amount_nano_usd=10,
            run_id="run_1",
            seq=seq,
        )
        assert await connection.fetchval("select count(*) from credit_hold") == held


async def test_budgets_warn_once(connection: Any) -> None:
    """At 80 and at 100 percent, for a key and for its tenant, once a month each."""
    await add_tenant(connection, budget_nano_usd=10_000, key_id="key_1", key_budget_nano_usd=1_000)

    async def use(number: int, tokens: int) -> list[tuple[str | None, int]]:
        await record_events(
            connection, [make_event(number, occurred_at=time.time(), prompt=tokens)]
        )
        return [(one.key_id, one.percent) for one in await list_warnings(connection, "ten_a")]

    assert await use(1, 79) == []
    assert await use(2, 1) == [("key_1", 80)]
    assert await use(3, 1) == [("key_1", 80)]
    assert await use(4, 19) == [("key_1", 100), ("key_1", 80)]
    assert (None, 80) in await use(5, 700)
    assert [(one.key_id, one.spent_nano_usd) for one in await list_budgets(connection, None)] == [
        (None, 8_000),
        ("key_1", 8_000),
    ]
