"""Reading the audit log: who may, what can be asked for, in pages, as CSV and by the command."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from support.audit import audit_lines
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client import wire
from river_client.cli import river
from river_gateway.limits import AUDIT_DETAILS_MAX_BYTES
from river_gateway.tenancy import audit

API = "/river/v1"


async def test_a_tenant_reads_what_concerns_it(rig: Rig) -> None:
    """Its own lines, an admin's actions on it among them; not another's, nor by a key that may only infer."""
    for who in (rig.tenant, rig.stranger):
        await rig.admin.post("/keys", wire.CreateKey(tenant=who.tenant_id, name="fresh"))
    await rig.tenant.http.put(f"{API}/aliases/mine", json={"target": BASE})
    entries = (await rig.tenant.get("/audit")).json()["entries"]
    assert [(one["action"], one["key_id"]) for one in entries] == [
        ("aliases.put", rig.tenant.key_id),
        ("keys.create", rig.admin.key_id),
    ]
    assert (await rig.tenant.get("/audit", tenant=rig.tenant.tenant_id)).json()[
        "entries"
    ] == entries
    for other in (rig.stranger.tenant_id, "*", "stranger"):
        assert (await rig.tenant.get("/audit", tenant=other)).status_code == 403
    asked = wire.CreateKey(tenant=rig.tenant.tenant_id, scopes=["infer"])
    secret = (await rig.admin.post("/keys", asked)).json()["secret"]
    headers = {"authorization": f"Bearer {secret}"}
    assert (await rig.tenant.http.get(f"{API}/audit", headers=headers)).status_code == 403


async def test_lines_are_found(rig: Rig) -> None:
    """By day, action, noun and tenant; pages follow each other without a gap, and CSV has all of them."""
    for number in range(5):
        await rig.admin.post("/keys", wire.CreateKey(tenant="tenant", name=f"=key {number}"))
    await rig.admin.post("/tenants", wire.CreateTenant(name="third"))
    today = datetime.now(UTC).date()
    assert len(await audit_lines(rig, day=today.isoformat())) == 6
    assert await audit_lines(rig, day=(today - timedelta(days=1)).isoformat()) == []
    assert len(await audit_lines(rig, action="keys.create")) == 5
    assert len(await audit_lines(rig, action="keys", tenant="tenant")) == 5
    assert await audit_lines(rig, action="key") == []
    assert [one.tenant_name for one in await audit_lines(rig, tenant="third")] == ["third"]
    every = await audit_lines(rig)
    pages, before = [], {}
    while page := await audit_lines(rig, limit=4, **before):
        pages += page
        before = {"before": page[-1].entry_id}
    assert pages == every
    answer = await rig.admin.get("/audit", action="keys", format="csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(row["entry_id"]) for row in rows] == [one.entry_id for one in every[1:]]
    assert json.loads(rows[0]["details"])["name"] == "=key 4"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"day": "yesterday"}, "day"),
        ({"day": "9999-12-31"}, "day"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"before": -1}, "before"),
        ({"before": 2**63}, "before"),
    ],
    ids=str,
)
async def test_what_cannot_be_asked(rig: Rig, asked: dict[str, Any], param: str) -> None:
    """422 that names the field."""
    answer = await rig.admin.get("/audit", **asked)
    assert answer.status_code == 422, answer.text
    assert error_of(answer).param == param


async def test_long_details_are_left_out(rig: Rig) -> None:
    """Details too long to keep say how long they were, and a name that is a secret's is never kept."""
    by = audit.Actor(rig.admin.key_id, rig.admin.tenant_id, "request", "api")
    for details in ({"text": "x" * AUDIT_DETAILS_MAX_BYTES}, {"secret": "rv-x", "name": "n"}):
        await audit.write(
            rig.services.pool, by, "keys.create", subject="k", tenant_id=None, details=details
        )
    kept, too_long = await audit_lines(rig)
    assert kept.details == {"name": "n"}
    assert too_long.details == {"left_out_bytes": AUDIT_DETAILS_MAX_BYTES + len('{"text":""}')}


async def test_the_command_shows_theaudit_lines(rig: Rig) -> None:
    """`river audit` has a line for each action, for people and as JSON."""
    await rig.admin.post("/tenants", wire.CreateTenant(name="new"))
    environment = {"RIVER_BASE_URL": rig.url, "RIVER_API_KEY": rig.admin.secret}
    for arguments in (["audit"], ["audit", "--json", "--action", "tenants", "--limit", "5"]):
        done = await asyncio.to_thread(CliRunner().invoke, river, arguments, env=environment)
        assert done.exit_code == 0, done.output
        assert "tenants.create" in done.output
    (entry,) = json.loads(done.output)
    assert entry["details"] == {"name": "new"}
