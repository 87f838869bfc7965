"""Credit and budgets at the door: nothing is begun that cannot be paid, and what is settled is what is billed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
import openai
import pytest
import pytest_asyncio
from click.testing import CliRunner
from support.gateway import Rig, Tenant, error_of
from support.stand_ins import BASE

from river_billing.amounts import amount_nano_usd, discounted_unit_prices
from river_billing.discounts import set_discount
from river_billing.events import UsageKind
from river_billing.ledger import add_credit, credit_of, set_billing
from river_billing.prices import seed_prices, set_price
from river_billing.recorder import record_events
from river_client import credit_wire, wire
from river_client.cli import river
from river_gateway.checkpoints.catalog import RunRow
from river_gateway.database import Pool, open_pool
from river_gateway.errors import OutOfCreditError, UnavailableError
from river_gateway.tenancy.auth import Principal
from river_gateway.tenancy.credit import UNBOUNDED, Credit, Hold
from river_gateway.tenancy.messages import AccountChanged

ONE_TOKEN = {UsageKind.COMPLETION: 1}
CHAT: dict[str, Any] = {
    "model": BASE,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
}
LONG_CHAT: dict[str, Any] = {**CHAT, "max_tokens": 1000}


@pytest_asyncio.fixture
async def pool(postgres_url: str) -> AsyncIterator[Pool]:
    """Connections to a database where a token of BASE costs 10,000 nano-dollars."""
    opened = await open_pool(postgres_url)
    async with opened.acquire() as connection:
        await price(connection, 10_000)
    yield opened
    await opened.close()


async def price(connection: Any, nano_usd: int) -> None:
    """Every token of the base model costs that much from now on."""
    await seed_prices(connection)
    for kind in (UsageKind.PROMPT, UsageKind.COMPLETION, UsageKind.TRAINING):
        await set_price(
            connection,
            model=BASE,
            context_length=1024,
            kind=kind,
            nano_usd_per_unit=Decimal(nano_usd),
        )


async def prepaid(pool: Pool, tokens: int, tenant_id: str = "ten_a") -> Principal:
    """A key of a prepaid tenant with credit for so many tokens."""
    async with pool.acquire() as connection:
        await connection.execute(
            "insert into tenant (tenant_id, name, billing) values ($1, $1, 'prepaid')", tenant_id
        )
        await add_credit(
            connection, tenant_id=tenant_id, amount_nano_usd=10_000 * tokens, reference="first"
        )
    return Principal(tenant_id, f"key_{tenant_id}", frozenset({"infer"}), None, bounded=True)


@asynccontextmanager
async def running(pool: Pool) -> AsyncGenerator[Credit]:
    """A gateway's credit with its background task."""
    credit = Credit(pool)
    task = asyncio.create_task(credit.run())
    try:
        yield credit
    finally:
        task.cancel()
        await asyncio.wait([task])
        await credit.close()


async def hold_one(credit: Credit, principal: Principal) -> Hold | None:
    """A hold of one token, as a request gets it; None where there is no credit."""
    held = credit.try_hold(principal, BASE, 1024, ONE_TOKEN)
    if held is not None:
        return held
    try:
        return await credit.hold(principal, BASE, 1024, ONE_TOKEN)
    except OutOfCreditError as error:
        assert "out of credit" in error.message  # noqa: PT017 - what else it may be is the point
        return None


async def test_concurrent_requests_are_admitted_up_to_the_credit(pool: Pool) -> None:
    """400 requests at once over three gateways, with credit for 100: 100 are admitted and no more."""
    principal = await prepaid(pool, 100)
    gateways = [Credit(pool) for _ in range(3)]
    held = await asyncio.gather(
        *(hold_one(gateways[number % 3], principal) for number in range(400))
    )
    admitted = [one for one in held if one is not None]
    assert len(admitted) == 100
    for one in admitted:
        one.settle({})
    for gateway in gateways:
        await gateway.close()
    async with pool.acquire() as connection:
        standing = await credit_of(connection, "ten_a")
    assert (standing.balance_nano_usd, standing.reserved_nano_usd) == (10_000 * 100, 0)


async def test_most_requests_are_decided_in_memory(pool: Pool) -> None:
    """With ample credit only the first request asks Postgres; a hold and its end take microseconds."""
    principal = await prepaid(pool, 10**8)
    async with running(pool) as credit:
        first = await hold_one(credit, principal)
        assert first is not None
        started = time.perf_counter()
        for _ in range(1000):
            held = credit.try_hold(principal, BASE, 1024, ONE_TOKEN)
            assert held is not None
            held.settle(ONE_TOKEN)
        per_hold_us = (time.perf_counter() - started) * 1000
        first.settle({})
    assert per_hold_us < 200, per_hold_us  # some 4 on a quiet machine
    async with pool.acquire() as connection:
        standing = await credit_of(connection, "ten_a")
    assert standing.reserved_nano_usd == 10_000 * 1000  # settled, and not recorded yet


async def test_a_lease_is_renewed_before_it_runs_out(pool: Pool) -> None:
    """Requests that go on using credit find more of it without waiting."""
    principal = await prepaid(pool, 10**6)
    async with running(pool) as credit:
        waited = 0
        for _ in range(300):
            held = credit.try_hold(principal, BASE, 1024, {UsageKind.COMPLETION: 1000})
            if held is None:
                waited += 1
                held = await credit.hold(principal, BASE, 1024, {UsageKind.COMPLETION: 1000})
            held.settle({UsageKind.COMPLETION: 1000})
            await asyncio.sleep(0.002)
        assert waited < 30


async def test_a_settled_hold_is_settled_once(pool: Pool) -> None:
    """The second time nothing happens, and the shared hold of the unbounded holds nothing."""
    principal = await prepaid(pool, 10)
    credit = Credit(pool)
    held = await hold_one(credit, principal)
    assert held is not None
    held.settle(ONE_TOKEN)
    held.settle({})
    assert held.reserved_nano_usd == 10_000
    assert held.lease_id is not None
    free = dataclasses.replace(principal, bounded=False)
    assert credit.try_hold(free, BASE, 1024, ONE_TOKEN) is UNBOUNDED
    UNBOUNDED.settle(ONE_TOKEN)
    assert (UNBOUNDED.lease_id, UNBOUNDED.reserved_nano_usd) == (None, 0)
    await credit.close()


async def test_new_credit_is_seen(pool: Pool) -> None:
    """A refused tenant that pays is served again."""
    principal = await prepaid(pool, 1)
    credit = Credit(pool)
    assert await hold_one(credit, principal) is not None
    assert await hold_one(credit, principal) is None
    async with pool.acquire() as connection:
        await add_credit(connection, tenant_id="ten_a", amount_nano_usd=10_000, reference="second")
    async with asyncio.timeout(10):
        while await hold_one(credit, principal) is None:  # noqa: ASYNC110 - polls as clients do
            await asyncio.sleep(0.05)
    assert await hold_one(credit, principal) is None
    await credit.close()


async def test_credit_goes_on_without_postgres_for_a_while(pool: Pool) -> None:
    """A lease lasts through a short outage; what it does not cover is told to come back."""
    principal = await prepaid(pool, 10**6)
    credit = Credit(pool)
    assert await hold_one(credit, principal) is not None
    await pool.close()
    assert credit.try_hold(principal, BASE, 1024, ONE_TOKEN) is not None
    with pytest.raises(UnavailableError):
        await credit.hold(principal, BASE, 1024, {UsageKind.COMPLETION: 10**6})


# ---- Over HTTP -------------------------------------------------------------------------------------------------------


async def make_prepaid(rig: Rig, postgres_url: str, amount_nano_usd: int) -> Any:
    """A connection to the rig's database where the tenant is prepaid."""
    connection = await asyncpg.connect(postgres_url)
    await price(connection, 10_000)
    await set_billing(connection, rig.tenant.tenant_id, "prepaid")
    if amount_nano_usd:
        await add_credit(
            connection,
            tenant_id=rig.tenant.tenant_id,
            amount_nano_usd=amount_nano_usd,
            reference="first",
        )
    return connection


async def test_out_of_credit_is_told_before_any_work(rig: Rig, postgres_url: str) -> None:
    """402 in both dialects, with OpenAI's words on /v1, and no engine or trainer hears of it."""
    run = await rig.tenant.new_run()
    connection = await make_prepaid(rig, postgres_url, 0)
    rig.services.keys.forget(AccountChanged(tenant_id=rig.tenant.tenant_id))
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.tenant.openai.chat.completions.create(**CHAT, stream=stream)
        assert caught.value.status_code == 402
        assert caught.value.type == "insufficient_quota"
        assert caught.value.code == "insufficient_quota"
        assert "out of credit" in caught.value.message
    asked = wire.SampleRequest(model=BASE, prompt_token_ids=[[1, 2]], max_tokens=2)
    sampled = await rig.tenant.post("/sample", asked)
    trained = await rig.tenant.submit(
        run.run_id, 1, wire.Forward(data=[wire.Datum(input_ids=[1, 2, 3])])
    )
    for answer in (sampled, trained):
        assert answer.status_code == 402
        assert error_of(answer).type == "out_of_credit"
    assert all(not engine.requests for engine in rig.engines)
    assert (await rig.tenant.result(f"{run.run_id}-1", timeout_s=0)).status == "pending"
    await connection.close()


async def test_what_is_settled_is_what_is_billed(rig: Rig, postgres_url: str) -> None:
    """After answers, streams and samples credit is less by exactly the bill, and nothing stays set aside."""
    connection = await make_prepaid(rig, postgres_url, 10**11)
    rig.services.keys.forget(AccountChanged(tenant_id=rig.tenant.tenant_id))
    await rig.tenant.openai.chat.completions.create(**CHAT)
    async for _ in await rig.tenant.openai.chat.completions.create(**CHAT, stream=True):
        pass
    asked = wire.SampleRequest(model=BASE, prompt_token_ids=[[1, 2]], max_tokens=2)
    assert (await rig.tenant.post("/sample", asked)).status_code == 200
    events = await rig.usage(3)
    assert all(event.lease_id and event.reserved_nano_usd for event in events)
    before = await credit_of(connection, rig.tenant.tenant_id)
    await record_events(connection, events)
    after = await credit_of(connection, rig.tenant.tenant_id)
    billed = await connection.fetchval("select sum(amount_nano_usd) from usage_event")
    assert billed == sum(event.reserved_nano_usd for event in events)
    assert after.balance_nano_usd == 10**11 - billed
    assert before.reserved_nano_usd - after.reserved_nano_usd == billed
    await rig.services.credit.close()
    assert (await credit_of(connection, rig.tenant.tenant_id)).reserved_nano_usd == 0
    await connection.close()


async def test_a_failed_request_gives_its_hold_back(rig: Rig, postgres_url: str) -> None:
    """An engine's refusal costs nothing and leaves nothing held."""
    connection = await make_prepaid(rig, postgres_url, 10**11)
    rig.services.keys.forget(AccountChanged(tenant_id=rig.tenant.tenant_id))
    for engine in rig.engines:
        engine.behaviour = "refuse"
    with pytest.raises(openai.BadRequestError):
        await rig.tenant.openai.chat.completions.create(**CHAT)
    await rig.services.credit.close()
    assert (await credit_of(connection, rig.tenant.tenant_id)).reserved_nano_usd == 0
    await connection.close()


async def test_holds_are_of_discounted_prices(pool: Pool) -> None:
    """Whoever pays a quarter has four times the room, in gateways and in Postgres; nobody else has more."""
    cheap, plain = await prepaid(pool, 10), await prepaid(pool, 10, "ten_b")
    async with pool.acquire() as connection:
        await set_discount(
            connection, tenant_id="ten_a", model="*", kind=None, share=Decimal("0.75")
        )
    credit = Credit(pool)
    run = RunRow(
        run_id="run_1",
        session_id="ses_1",
        base_model=BASE,
        lora=wire.LoraConfig(),
        context_length=1024,
        created_at="2026-11-25T00:00:00+00:00",
        last_seq=-1,
        step=0,
        metrics={},
        imported=False,
        lost=None,
        tags={},
        user_metadata={},
        model_seq_id=None,
        updated_at="2026-11-25T00:00:00+00:00",
    )
    await credit.hold_operation(cheap, run, 1, training_tokens=8)
    async with pool.acquire() as connection:
        assert (await credit_of(connection, "ten_a")).reserved_nano_usd == 8 * 2_500
    for principal, admitted in ((cheap, 40 - 8), (plain, 10)):
        held = [await hold_one(credit, principal) for _ in range(admitted)]
        assert await hold_one(credit, principal) is None
        one = held[0]
        assert one is not None
        one.settle(ONE_TOKEN)
        assert one.reserved_nano_usd == (2_500 if principal is cheap else 10_000)
    await credit.close()


@pytest.mark.parametrize(
    ("price_nano_usd", "share", "quantity"),
    [("0.000000001", "0.99999999", 10**9), ("333.333333333", "0.33333333", 4096), ("7", "1", 9)],
)
async def test_what_is_held_suffices_for_a_discounted_amount(
    pool: Pool, price_nano_usd: str, share: str, quantity: int
) -> None:
    """However the price of a unit ends, a hold is what Postgres will charge, or a nano-dollar more."""
    async with pool.acquire() as connection:
        await set_price(
            connection,
            model="m",
            context_length=1024,
            kind=UsageKind.COMPLETION,
            nano_usd_per_unit=Decimal(price_nano_usd),
        )
        await set_discount(
            connection, tenant_id="ten_a", model="m", kind=None, share=Decimal(share)
        )
        prices = (await discounted_unit_prices(connection, "m", 1024))["ten_a"]
        charged = await connection.fetchval(
            "select round_half_even($1::bigint * $2::numeric * (1 - $3::numeric))",
            quantity,
            Decimal(price_nano_usd),
            Decimal(share),
        )
    assert charged <= amount_nano_usd({UsageKind.COMPLETION: quantity}, prices) <= charged + 1


async def test_an_operation_is_held_until_its_usage_is_recorded(
    rig: Rig, postgres_url: str
) -> None:
    """Its tokens' price is set aside in Postgres, once however often it is sent."""
    run = await rig.tenant.new_run()
    connection = await make_prepaid(rig, postgres_url, 10**9)
    rig.services.keys.forget(AccountChanged(tenant_id=rig.tenant.tenant_id))
    for _ in range(2):
        accepted = await rig.tenant.submit(
            run.run_id, 1, wire.Forward(data=[wire.Datum(input_ids=[1, 2, 3])])
        )
        assert accepted.status_code == 202
    standing = await credit_of(connection, rig.tenant.tenant_id)
    assert standing.reserved_nano_usd == 3 * 10_000
    await connection.close()


async def test_budgets_by_http(rig: Rig, postgres_url: str) -> None:
    """A key whose budget is used up gets 402 and learns when it resets; there is a warning, and an end of it."""
    connection = await asyncpg.connect(postgres_url)
    await price(connection, 10_000)
    body = credit_wire.SetBudget(monthly_budget_nano_usd=60_000, key_id=rig.tenant.key_id)
    answer = await rig.admin.http.put("/river/v1/budgets", content=msgspec.json.encode(body))
    assert answer.status_code == 200, answer.text
    with pytest.raises(openai.APIStatusError) as caught:
        await rig.tenant.openai.chat.completions.create(**LONG_CHAT)
    assert caught.value.status_code == 402
    assert "this API key's monthly budget of $0.00006 is used up" in caught.value.message
    assert "resets at" in caught.value.message
    found = msgspec.json.decode(
        (await rig.tenant.get("/budgets")).content, type=credit_wire.Budgets
    )
    assert [(one.key_id, one.budget_nano_usd) for one in found.budgets] == [
        (rig.tenant.key_id, 60_000)
    ]
    assert [(one.percent, one.key_id) for one in found.warnings] == [(100, rig.tenant.key_id)]
    off = credit_wire.SetBudget(monthly_budget_nano_usd=None, key_id=rig.tenant.key_id)
    await rig.admin.http.put("/river/v1/budgets", content=msgspec.json.encode(off))
    assert (await rig.tenant.openai.chat.completions.create(**CHAT)).id
    await connection.close()


async def test_credit_by_http(rig: Rig) -> None:
    """An admin books credit once per reference and reads anybody's; a tenant reads its own and changes nothing."""
    body = credit_wire.AddCredit(
        tenant="tenant", amount_nano_usd=5 * 10**9, reference="wire-7", note="first"
    )
    first, again = [await rig.admin.post("/credit", body) for _ in range(2)]
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert first.json()["actor"] == rig.admin.key_id
    other = msgspec.structs.replace(body, amount_nano_usd=1)
    assert (await rig.admin.post("/credit", other)).status_code == 409
    wrong = msgspec.structs.replace(body, amount_nano_usd=-1, reference="x")
    refused = await rig.admin.post("/credit", wrong)
    assert (refused.status_code, error_of(refused).param) == (422, "amount_nano_usd")
    unknown = msgspec.structs.replace(body, tenant="nobody")
    assert (await rig.admin.post("/credit", unknown)).status_code == 404
    mode = credit_wire.SetBilling(tenant="tenant", billing="prepaid")
    put = await rig.admin.http.put("/river/v1/credit/billing", content=msgspec.json.encode(mode))
    assert put.json()["billing"] == "prepaid"
    own = (await rig.tenant.get("/credit")).json()
    assert own["balance_nano_usd"] == 5 * 10**9
    assert (await rig.admin.get("/credit", tenant="tenant")).json() == own
    entries = (await rig.tenant.get("/credit/entries")).json()["transactions"]
    assert [one["entries"] for one in entries] == [{"credit": 5 * 10**9, "payments": -5 * 10**9}]
    assert (await rig.stranger.get("/credit", tenant="tenant")).status_code == 403
    assert (await rig.tenant.post("/credit", body)).status_code == 403


async def test_money_by_command(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`river credit` and `river budgets` do by name what the API does, exact to the nano-dollar."""
    monkeypatch.setenv("RIVER_BASE_URL", rig.url)

    async def run(who: Tenant, *words: str) -> str:
        monkeypatch.setenv("RIVER_API_KEY", who.secret)
        result = await asyncio.to_thread(CliRunner().invoke, river, words)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    added = await run(rig.admin, "credit", "add", "tenant", "25.000000001", "--reference", "w1")
    assert added == "25.000000001 booked as w1; the credit is 25.000000001.\n"
    await run(rig.admin, "credit", "add", "tenant", "25.000000001", "--reference", "w1")
    taken = await run(
        rig.admin,
        *("credit", "add", "tenant", "--kind", "adjustment", "--note", "oops", "--", "-5"),
    )
    assert taken.startswith("-5.00 booked as ")
    await run(rig.admin, "credit", "billing", "tenant", "prepaid")
    standing = json.loads(await run(rig.tenant, "credit", "show", "--json"))
    assert standing["billing"] == "prepaid"
    assert standing["balance_nano_usd"] == 20_000_000_001
    entries = json.loads(await run(rig.tenant, "credit", "entries", "--json"))
    assert [(one["kind"], one.get("note")) for one in entries] == [
        ("adjustment", "oops"),
        ("top_up", None),
    ]
    assert "20.000000001" in await run(rig.admin, "credit", "show", "--tenant", "tenant")
    await run(rig.admin, "budgets", "set", "10", "--tenant", "tenant")
    shown = await run(rig.tenant, "budgets", "list")
    assert rig.tenant.tenant_id in shown
    assert "10.00" in shown
    assert json.loads(await run(rig.tenant, "budgets", "warnings", "--json")) == []
    off = await run(rig.admin, "budgets", "set", "--none", "--tenant", "tenant", "--json")
    assert json.loads(off) == []
    for wrong in (["budgets", "set", "1"], ["credit", "add", "tenant", "0.0000000001"]):
        assert CliRunner().invoke(river, wrong).exit_code == 2
