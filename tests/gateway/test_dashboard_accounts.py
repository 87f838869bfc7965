"""Usage, invoices, keys and machines on the dashboard."""

from __future__ import annotations

import re

import asyncpg
from support.dashboard import signed_in
from support.gateway import Rig

from river_gateway.dashboard.spending import OTHERS, SHOWN_MAX, read_spending

_USE = """
insert into usage_hour (tenant_id, hour, base_model, context_length, kind, key_id, quantity, amount_nano_usd, events)
values ($1, date_trunc('hour', now()) - make_interval(days => $2), $3, 1024, $4, 'key_x', $5, $6, 1)
"""


async def use(rig: Rig, tenant_id: str, model: str, **changes: int) -> None:
    """Usage that has been recorded."""
    values = {"days": 0, "quantity": 1000, "nano_usd": 2_000_000_000} | changes
    connection = await asyncpg.connect(rig.services.settings.postgres_url)
    try:
        amounts = (values["quantity"], values["nano_usd"])
        await connection.execute(_USE, tenant_id, values["days"], model, "completion", *amounts)
    finally:
        await connection.close()


async def test_spending_sums_to_what_was_billed(rig: Rig) -> None:
    """Bars, groups and totals say the same; the many small ones are one group; older days are left out."""
    mine = rig.tenant.tenant_id
    for number in range(SHOWN_MAX + 3):
        await use(rig, mine, f"model-{number}", nano_usd=10**9 * (number + 1), days=number % 3)
    await use(rig, mine, "model-old", days=8)
    await use(rig, rig.stranger.tenant_id, "theirs")
    found = await read_spending(rig.services.pool, mine, days=7, told="model")
    assert len(found.groups) == SHOWN_MAX + 1
    assert found.groups[0].name == f"model-{SHOWN_MAX + 2}"
    assert found.groups[-1].name == OTHERS
    assert found.groups[-1].nano_usd == 10**9 * (1 + 2 + 3)
    assert found.total_nano_usd == 10**9 * sum(range(1, SHOWN_MAX + 4))
    assert found.total_tokens == 1000 * (SHOWN_MAX + 3)
    bars = found.bars("dollars")
    tallest = max(sum(bar.height for bar in bars if bar.x == x) for x in {bar.x for bar in bars})
    assert abs(tallest - 200) < 1e-6
    everything = await read_spending(rig.services.pool, None, days=30, told="model")
    assert everything.total_nano_usd == found.total_nano_usd + 2 * 2_000_000_000
    nothing = await read_spending(rig.services.pool, "ten_0", days=7, told="kind")
    assert nothing.bars("tokens") == []


async def test_usage_is_one_s_own(rig: Rig) -> None:
    """Page and CSV have a tenant's usage and nobody else's; an admin may look at one tenant's."""
    await use(rig, rig.tenant.tenant_id, "mine-model")
    await use(rig, rig.stranger.tenant_id, "their-model")
    async with signed_in(rig, rig.tenant) as window:
        for path in ("/usage?days=7&by=model", "/usage?days=nonsense&by=x&measure=y", "/usage.csv"):
            text = await window.page(path)
            assert "mine-model" in text
            assert "their-model" not in text
        csv = await window.client.get("/admin/usage.csv")
        assert csv.headers["content-disposition"].startswith("attachment")
        api = await rig.tenant.get("/usage/series", format="csv")
        assert csv.text == api.text
        assert (await window.client.get("/admin/invoices/1")).status_code == 404
    async with signed_in(rig, rig.admin) as window:
        text = await window.page(f"/usage?tenant={rig.stranger.tenant_id}")
        assert "their-model" in text
        assert "mine-model" not in text


async def test_a_key_is_shown_once_and_ends_at_once(rig: Rig) -> None:
    """The page that answers the form has it, no other does; revoked, the next request with it is 401."""
    async with signed_in(rig, rig.admin) as window:
        form = {"tenant": rig.tenant.tenant_id, "name": "fresh", "scopes": "infer"}
        made = await window.send("/keys", **form)
        assert made.status_code == 201
        found = re.search(r'id="secret">(rv-[\w-]+)<', made.text)
        assert found is not None
        secret = found[1]
        assert secret not in await window.page("/keys")
        headers = {"authorization": f"Bearer {secret}"}
        url = f"{rig.url}/v1/models"
        assert (await window.client.get(url, headers=headers)).status_code == 200
        keys = (await rig.admin.get("/keys")).json()["keys"]
        (key,) = [key for key in keys if key["name"] == "fresh"]
        assert key["scopes"] == ["infer"]
        done = await window.send("/keys/revoke", key_id=key["key_id"])
        assert done.status_code == 303
        assert (await window.client.get(url, headers=headers)).status_code == 401
        assert "revoked" in await window.page("/keys")
        for wrong in ({"tenant": "ten_0"}, {"name": ""}, {"expires_at": "soon"}, {"scopes": "all"}):
            refused = await window.send("/keys", **(form | wrong))
            assert refused.status_code in (404, 422), wrong
        assert (await window.send("/tenants", name="Newcomers")).status_code == 303
        assert "Newcomers" in await window.page("/keys")


async def test_administration_is_for_admins(rig: Rig) -> None:
    """A tenant's key neither sees nor does any of it, and is not shown the way there."""
    async with signed_in(rig, rig.tenant) as window:
        page = await window.page("")
        assert "/admin/keys" not in page
        for path in ("/keys", "/machines", "/machines/live"):
            assert (await window.client.get(f"/admin{path}")).status_code == 403
        for path in ("/keys", "/keys/revoke", "/tenants"):
            answer = await window.send(path, tenant=rig.tenant.tenant_id, name="x", key_id="key_0")
            assert answer.status_code == 403
    async with signed_in(rig, rig.admin) as window:
        machines = await window.page("/machines")
        assert rig.engines[0].record().engine_id in machines
        for path in ("/keys", "/keys/revoke", "/tenants"):
            assert (await window.client.post(f"/admin{path}", data={})).status_code == 403
