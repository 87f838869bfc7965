"""Invoices by HTTP, by the SDK and by the command."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.billing import make_event
from support.gateway import Rig, Tenant, error_of

import river_client as river
from river_billing.prices import seed_prices
from river_billing.recorder import record_events
from river_client.cli import river as command
from river_client.invoice_wire import CloseInvoices

OCTOBER = datetime(2024, 10, 20, tzinfo=UTC).timestamp()


async def use(rig: Rig) -> None:
    """Something of the tenant's and the stranger's, in October and now."""
    async with rig.services.pool.acquire() as connection:
        await seed_prices(connection)
        now = datetime.now(UTC).timestamp()
        await record_events(
            connection,
            [
                make_event(number, tenant_id=who.tenant_id, occurred_at=moment, completion=10**6)
                for who in (rig.tenant, rig.stranger)
                for number, moment in enumerate((OCTOBER, now))
            ],
        )


async def close(rig: Rig, who: Tenant, month: str = "2024-10") -> int:
    """Closes a tenant's October; its number."""
    answer = await rig.admin.post("/invoices", CloseInvoices(tenant=who.tenant_id, month=month))
    assert answer.status_code == 200, answer.text
    (invoice,) = answer.json()["invoices"]
    return invoice["number"]


async def test_a_tenant_sees_its_own(rig: Rig) -> None:
    """Its invoices, closed and open, are a tenant's alone; an administrator sees all."""
    await use(rig)
    own, foreign = await close(rig, rig.tenant), await close(rig, rig.stranger)
    listed = (await rig.tenant.get("/invoices")).json()["invoices"]
    assert [one["number"] for one in listed] == [own]
    assert (await rig.tenant.get(f"/invoices/{own}")).json()["lines"][0]["quantity"] == 10**6
    for number in (foreign, 99, 0, 2**63):
        assert (await rig.tenant.get(f"/invoices/{number}")).status_code == 404
    assert (await rig.tenant.get("/invoices", tenant="*")).status_code == 403
    everybody = (await rig.admin.get("/invoices", tenant="*")).json()["invoices"]
    assert [one["number"] for one in everybody] == [foreign, own]
    older = await rig.admin.get("/invoices", tenant="*", before=foreign, limit=1)
    assert [one["number"] for one in older.json()["invoices"]] == [own]
    (opened,) = (await rig.tenant.get("/invoices/open")).json()["invoices"]
    assert opened["month"] == f"{datetime.now(UTC):%Y-%m}"
    assert "number" not in opened
    assert (await rig.admin.get("/invoices/open", tenant="*")).status_code == 422


async def test_the_page_to_print(rig: Rig) -> None:
    """A browser, or whoever asks for it, gets a page under a policy that lets it load nothing."""
    await use(rig)
    number = await close(rig, rig.tenant)
    route = f"/river/v1/invoices/{number}"
    by_accept = await rig.tenant.http.get(route, headers={"accept": "text/html,*/*"})
    by_format = await rig.tenant.http.get(route, params={"format": "html"})
    assert by_accept.text == by_format.text
    assert by_accept.headers["content-type"] == "text/html; charset=utf-8"
    assert by_accept.headers["content-security-policy"].startswith("default-src 'none'")
    assert f"Invoice {number:06d}" in by_accept.text
    assert "0.030000000" in by_accept.text


async def test_who_may_close_and_what(rig: Rig) -> None:
    """Only an administrator closes, and only a month that is over; twice is the same invoice."""
    await use(rig)
    body = CloseInvoices(tenant="tenant", month="2024-10")
    assert (await rig.tenant.post("/invoices", body)).status_code == 403
    assert await close(rig, rig.tenant) == await close(rig, rig.tenant) == 1
    this_month = f"{datetime.now(UTC):%Y-%m}"
    early = await rig.admin.post("/invoices", CloseInvoices(tenant="tenant", month=this_month))
    assert (early.status_code, error_of(early).param) == (409, "month")
    wrong = await rig.admin.post("/invoices", CloseInvoices(tenant="tenant", month="October"))
    assert (wrong.status_code, error_of(wrong).param) == (422, "month")
    unknown = await rig.admin.post("/invoices", CloseInvoices(tenant="nobody", month="2024-10"))
    assert unknown.status_code == 404


async def test_the_sdk_and_the_command(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Close for all tenants, list, show, and print from the command line; the SDK has the same."""
    await use(rig)
    monkeypatch.setenv("RIVER_BASE_URL", rig.url)

    async def run(who: Tenant, *words: str, code: int = 0) -> str:
        monkeypatch.setenv("RIVER_API_KEY", who.secret)
        done = await asyncio.to_thread(CliRunner().invoke, command, ["invoices", *words])
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    closed = json.loads(await run(rig.admin, "close", "2024-10", "--json"))
    assert [one["number"] for one in closed] == [1, 2]
    table = (await run(rig.tenant, "list")).splitlines()
    assert table[0].split()[:3] == ["NUMBER", "MONTH", "TENANT"]
    assert len(table) == 2
    number = table[1].split()[0]
    shown = await run(rig.tenant, "show", number)
    assert shown.splitlines()[2].split()[-4:] == ["1,000,000", "0.03", "-", "0.03"]
    assert ["due", "0.03"] in [line.split() for line in shown.splitlines()]
    path = tmp_path / "invoice.html"
    await run(rig.tenant, "show", number, "--html", str(path))
    async with river.AsyncClient(rig.tenant.secret, rig.url) as client:
        assert path.read_text() == await client.invoices.page(int(number))
        (listed,) = await client.invoices.list()
        assert listed.number == int(number)
        assert (await client.invoices.get(int(number))).due_cents == 3
        with pytest.raises(river.PermissionDeniedError):
            await client.invoices.close("tenant", "2024-10")
    assert "open, " in await run(rig.tenant, "show", "--open")
    assert len(json.loads(await run(rig.tenant, "show", "--open", "--json"))) == 1
    assert "2" in await run(rig.admin, "list", "--all")
    await run(rig.tenant, "show", code=2)
