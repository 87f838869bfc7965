"""Prices, discounts and the audit log on the dashboard: what is in force, planned, over, tried out, set and found."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from support.dashboard import signed_in
from support.gateway import Rig

from river_client import wire
from river_gateway.dashboard.price_pages import current_prices

PRICE = {"model": "m", "context_length": "4,096", "kind": "prompt", "usd_per_million": "0.5"}
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def _price(usd: str, begin: int, end: int | None, kind: str = "prompt") -> wire.Price:
    """A price from one day of June 2026 to another."""
    days = [
        None if day is None else (NOW + timedelta(days=day)).isoformat() for day in (begin, end)
    ]
    return wire.Price(
        model="m",
        context_length=1,
        kind=kind,
        usd_per_million=usd,
        valid_from=days[0] or "",
        valid_to=days[1],
    )


def test_what_is_in_force_and_what_comes_then() -> None:
    """Prices that are over are left out; of those planned, the next one is shown; one may be planned only."""
    rows = [_price("1", -9, -5), _price("2", -5, 3), _price("3", 3, 6), _price("4", 6, None)]
    (found,) = current_prices(rows, NOW)
    assert (found.now, found.then) == (rows[1], rows[2])
    planned = _price("5", 2, None, "completion")
    (first, second) = current_prices([*rows, planned], NOW)
    assert (second.now, second.then) == (None, planned)
    assert current_prices([rows[0]], NOW) == []
    assert first == found


async def test_a_price_is_tried_out_and_set(rig: Rig) -> None:
    """The preview says what things cost and sets nothing; setting shows it in force, and its follower as planned."""
    later = (datetime.now(UTC) + timedelta(days=2)).strftime("%Y-%m-%dT%H:%M")
    async with signed_in(rig, rig.admin) as window:
        preview = await window.send("/prices", step="preview", **PRICE)
        assert preview.status_code == 200
        for shown in ('value="0.5"', "no price", "$0.0005", "$500.00"):
            assert shown in preview.text
        assert (await rig.admin.get("/prices")).json()["prices"] == []
        set_ = await window.send("/prices", step="set", **PRICE)
        assert set_.headers["location"] == "/admin/prices"
        planned = PRICE | {"usd_per_million": "0.75", "valid_from": later}
        preview = await window.send("/prices", step="preview", **planned)
        assert "$750.00" in preview.text
        await window.send("/prices", **planned)
        page = await window.page("/prices?model=m")
        for shown in ("$0.50<", "$0.75 from", "up to 4,096", "No price was ever replaced"):
            assert shown in page
        assert "$0.50<" not in await window.page("/prices?model=other")
        again = await window.send("/prices", **PRICE)
        assert again.status_code == 422
        assert "valid_from" in again.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"usd_per_million": "much"}, "is no decimal number"),
        ({"usd_per_million": "1001"}, "must be 0 to"),
        ({"context_length": ""}, "context_length: 0, must be 1 to"),
        ({"model": ""}, "model: 0 characters"),
        ({"kind": "thought"}, "is none of"),
        ({"valid_from": "2020-01-01T00:00"}, "is over"),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", ["preview", "set"])
async def test_what_is_wrong_with_a_price(
    rig: Rig, change: dict[str, str], said: str, step: str
) -> None:
    """The API's own sentence is beside the field, with what was typed; no price is set."""
    async with signed_in(rig, rig.admin) as window:
        answer = await window.send("/prices", step=step, **PRICE | change)
        assert answer.status_code == 422
        assert said in answer.text
        assert answer.text.count('aria-invalid="true"') == 1
        assert 'id="preview"' not in answer.text
    assert (await rig.admin.get("/prices")).json()["prices"] == []


async def test_discounts_are_given_and_seen(rig: Rig) -> None:
    """An admin gives one; its tenant sees it and has no form, a stranger does not see it."""
    async with signed_in(rig, rig.admin) as window:
        form = {
            "tenant": rig.tenant.tenant_id,
            "percent": "12.5",
            "kind": "completion",
            "model": "",
        }
        given = await window.send("/discounts", **form)
        assert given.headers["location"] == "/admin/prices#discounts"
        assert "12.5 %" in await window.page("/prices")
        wrong = await window.send("/discounts", **form | {"percent": "101"})
        assert wrong.status_code == 422
        assert "percent: 101, must be 0 to 100" in wrong.text
    for who, sees in ((rig.tenant, True), (rig.stranger, False)):
        async with signed_in(rig, who) as window:
            page = await window.page("/prices")
            assert ("12.5 %" in page) == sees
            assert "Set price" not in page
            assert (await window.send("/discounts", **form)).status_code == 403


async def test_the_audit_log_is_looked_through(rig: Rig) -> None:
    """Filters are in the address and in the CSV's; a tenant sees its own lines, an app's key none and no link."""
    await rig.admin.post("/tenants", wire.CreateTenant(name="third & fourth"))
    infer = await rig.admin.post(
        "/keys", wire.CreateKey(tenant=rig.tenant.tenant_id, name="<app>", scopes=["infer"])
    )
    today = datetime.now(UTC).date()
    async with signed_in(rig, rig.admin) as window:
        page = await window.page("/audit")
        assert "third &amp; fourth" in page
        assert "&lt;app&gt;" in page
        assert page.count("<tr>") == 3
        for query, lines in (
            ("action=keys", 1),
            ("action=tenants.create", 1),
            (f"tenant={rig.tenant.tenant_id}", 1),
            (f"day={today}", 2),
            (f"day={today - timedelta(days=1)}", 0),
            (f"action=keys&tenant={rig.stranger.tenant_id}", 0),
            ("action=nonsense&before=x", 2),
        ):
            page = await window.page(f"/audit?{query}")
            assert page.count("<tr>") == (lines + 1 if lines else 0), query
            answer = await window.client.get(f"/admin/audit.csv?{query}")
            assert len(list(csv.DictReader(io.StringIO(answer.text)))) == lines, query
        wrong = await window.client.get("/admin/audit?day=never")
        assert wrong.status_code == 422
        assert "is no day" in wrong.text
    async with signed_in(rig, rig.tenant) as window:
        page = await window.page("/audit")
        assert page.count("<tr>") == 2
        assert "third" not in page
        csv_text = (
            await window.client.get(f"/admin/audit.csv?tenant={rig.stranger.tenant_id}")
        ).text
        (row,) = csv.DictReader(io.StringIO(csv_text))
        assert json.loads(row["details"])["scopes"] == ["infer"]
    async with signed_in(rig, rig.tenant) as window:
        await window.client.post("/admin/sign-in", data={"key": infer.json()["secret"]})
        assert (await window.client.get("/admin/audit")).status_code == 403
        assert "/admin/audit" not in await window.page("")
