"""What tenants pay less: versioned, kept by each event, and rounded once together with the price."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any

import asyncpg
import pytest
from support.billing import TINY, make_event, totals

from river_billing.audit import find_differences
from river_billing.discounts import list_discounts, set_discount
from river_billing.errors import PriceError
from river_billing.events import UsageKind
from river_billing.ledger import ledger_differences
from river_billing.prices import set_price
from river_billing.recorder import record_events

EXACT = Context(prec=80, rounding=ROUND_HALF_EVEN)
LATER = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)

OVERLAPPING = """
insert into discount (tenant_id, model, kind, share, valid_from)
select tenant_id, model, kind, 0.7, valid_from + interval '1 hour' from discount
"""
PRICES = ("0", "0.000000001", "0.5", "1.5", "2.499999999", "37.5", "333.333333333", "1000000")
SHARES = ("0", "0.00000001", "0.1", "0.33333333", "0.5", "0.99999999", "1")
QUANTITIES = (1, 2, 3, 5, 999, 1_000_001, 10**12)


async def give(
    connection: Any,
    share: str,
    *,
    model: str = TINY,
    kind: UsageKind | None = None,
    at: datetime = LATER,
    tenant_id: str = "ten_a",
) -> None:
    """A discount in the future, where events of the test happen."""
    await set_discount(
        connection,
        tenant_id=tenant_id,
        model=model,
        kind=kind,
        share=Decimal(share),
        valid_from=at,
    )


def event_at(number: int, at: datetime, **quantities: Any) -> Any:
    """An event of ten_a."""
    return make_event(number, occurred_at=at.timestamp(), **quantities)


async def amounts(connection: Any) -> list[int]:
    """Of all lines, in the order of their events and kinds."""
    rows = await connection.fetch(
        "select amount_nano_usd from usage_event order by occurred_at, kind"
    )
    return [row[0] for row in rows]


async def test_amounts_are_those_of_a_golden_table(connection: Any) -> None:
    """Every price with every discount and quantity: SQL says what exact decimals say, rounded once and half to even."""
    wanted: dict[tuple[str, str], list[int]] = {}
    events = []
    for p, price in enumerate(PRICES):
        await set_price(
            connection,
            model=f"model-{p}",
            context_length=1024,
            kind=UsageKind.COMPLETION,
            nano_usd_per_unit=Decimal(price),
        )
        for d, share in enumerate(SHARES):
            tenant_id = f"ten_{p}_{d}"
            if Decimal(share):
                await set_discount(
                    connection,
                    tenant_id=tenant_id,
                    model="*",
                    kind=None,
                    share=Decimal(share),
                )
            for q, quantity in enumerate(QUANTITIES):
                exact = EXACT.multiply(
                    EXACT.multiply(Decimal(quantity), Decimal(price)), 1 - Decimal(share)
                )
                wanted.setdefault((tenant_id, price), []).append(
                    int(EXACT.to_integral_value(exact))
                )
                events.append(
                    make_event(
                        q,
                        tenant_id=tenant_id,
                        base_model=f"model-{p}",
                        occurred_at=LATER.timestamp(),
                        completion=quantity,
                    )
                )
    await record_events(connection, events)
    rows = await connection.fetch(
        "select tenant_id, array_agg(amount_nano_usd order by quantity) as amounts from usage_event group by 1"
    )
    found = {row["tenant_id"]: row["amounts"] for row in rows}
    assert found == {tenant_id: of for (tenant_id, _), of in wanted.items()}
    assert wanted["ten_2_0", "0.5"][:4] == [0, 1, 2, 2]
    assert (await find_differences(connection)).differences == []


async def test_the_most_specific_discount_applies_alone(connection: Any) -> None:
    """Of the model before that of all models, of the kind before that of all kinds, for this tenant only."""
    await give(connection, "0.1", model="*")
    await give(connection, "0.2", model="*", kind=UsageKind.PROMPT)
    await give(connection, "0.5", model="tiny-moe")
    await give(connection, "1", model="*", tenant_id="ten_b")
    await record_events(
        connection,
        [
            event_at(1, LATER, prompt=100, completion=100, training=100),
            make_event(2, base_model="new", occurred_at=LATER.timestamp() + 1, prompt=100),
            make_event(3, tenant_id="ten_c", occurred_at=LATER.timestamp() + 2, prompt=100),
            make_event(4, tenant_id="ten_b", occurred_at=LATER.timestamp() + 3, prompt=100),
        ],
    )
    assert await amounts(connection) == [1500, 500, 2500, 0, 1000, 0]
    kept = await connection.fetch(
        "select share from usage_event left join discount using (discount_id) "
        "order by occurred_at, usage_event.kind"
    )
    assert [row[0] and f"{row[0].normalize():f}" for row in kept] == [
        "0.5",
        "0.5",
        "0.5",
        "0.2",
        None,
        "1",
    ]
    assert await ledger_differences(connection) == []


async def test_a_change_never_changes_the_past(connection: Any) -> None:
    """Events on both sides of changes, in one batch, each with what held at its time; without one, the price."""
    hour = timedelta(hours=1)
    await give(connection, "0.5")
    await give(connection, "0.25", at=LATER + hour)
    await give(connection, "0", at=LATER + 2 * hour)
    step = timedelta(microseconds=1)
    moments = [
        moment + away
        for moment in (LATER, LATER + hour, LATER + 2 * hour)
        for away in (-step, timedelta())
    ]
    await record_events(
        connection, [event_at(number, at, prompt=100) for number, at in enumerate(moments)]
    )
    expected = [1000, 500, 500, 750, 750, 1000]
    assert await amounts(connection) == expected
    with pytest.raises(PriceError, match="valid_from"):
        await give(connection, "0.9", at=datetime.now(UTC) - hour)
    await record_events(connection, [event_at(1, moments[1], prompt=100)])
    assert await amounts(connection) == expected
    listed = await list_discounts(connection, "ten_a")
    assert [(one.percent, one.valid_to is None) for one in listed] == [("50", False), ("25", False)]
    assert await list_discounts(connection, "ten_b") == []
    assert (await totals(connection))[2] == sum(expected)


@pytest.mark.parametrize("share", ["-0.1", "1.1", "0.123456789"])
async def test_discounts_that_cannot_be_meant(connection: Any, share: str) -> None:
    """Negative, more than all, or finer than the table."""
    with pytest.raises(PriceError, match="share"):
        await give(connection, share)


@pytest.mark.parametrize(
    "statement",
    [
        "delete from discount",
        "truncate discount",
        "update discount set share = 1",
        "update discount set valid_to = '2021-01-01'",
        OVERLAPPING,
    ],
)
async def test_discounts_are_final(connection: Any, statement: str) -> None:
    """As prices are, and never two at once."""
    await give(connection, "0.5")
    with pytest.raises((asyncpg.RestrictViolationError, asyncpg.ExclusionViolationError)):
        await connection.execute(statement)


async def test_the_audit_knows_discounts(connection: Any) -> None:
    """It finds nothing where they applied, and an event that has the discount of somebody else."""
    await give(connection, "0.5")
    await give(connection, "0.5", tenant_id="ten_b")
    await record_events(connection, [event_at(1, LATER, prompt=100)])
    assert (await find_differences(connection)).differences == []
    await connection.execute("alter table usage_event disable trigger usage_event_final")
    await connection.execute("drop trigger final on usage_event_" + LATER.strftime("%Y_%m"))
    await connection.execute(
        "update usage_event set discount_id = (select discount_id from discount where tenant_id = 'ten_b')"
    )
    (found,) = (await find_differences(connection)).differences
    assert "discount" in found.about
