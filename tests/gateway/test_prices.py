"""Prices and discounts over HTTP and from the command line: set by admins, read by whom they concern."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client.cli import river

PRICE: dict[str, Any] = {
    "model": BASE,
    "context_length": 1024,
    "kind": "prompt",
    "usd_per_million": "0.123456789012",
}


async def put(rig: Rig, path: str, body: dict[str, Any]) -> Any:
    """As an admin."""
    return await rig.admin.http.put(f"/river/v1{path}", json=body)


async def test_a_price_is_set_and_seen_exactly(rig: Rig) -> None:
    """The new one is in force, the planned one is not yet, and the old one ends where the new begins."""
    first = await put(rig, "/prices", PRICE)
    assert first.status_code == 200, first.text
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    answer = await put(rig, "/prices", PRICE | {"usd_per_million": "7", "valid_from": later})
    prompts = [one for one in answer.json()["prices"] if one["kind"] == "prompt"]
    assert [one["usd_per_million"] for one in prompts] == ["0.123456789012", "7"]
    assert prompts[0]["valid_to"] == prompts[1]["valid_from"]
    assert prompts[1].get("valid_to") is None
    shown = (await rig.tenant.get("/prices")).json()["prices"]
    assert all(one in shown for one in prompts)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"context_length": 0}, "context_length"),
        ({"kind": "thought"}, "kind"),
        ({"usd_per_million": "much"}, "usd_per_million"),
        ({"usd_per_million": "NaN"}, "usd_per_million"),
        ({"usd_per_million": "1e999999"}, "usd_per_million"),
        ({"usd_per_million": "1e-999999"}, "usd_per_million"),
        ({"usd_per_million": "-1"}, "usd_per_million"),
        ({"usd_per_million": "1001"}, "usd_per_million"),
        ({"usd_per_million": "0.1234567890123"}, "usd_per_million"),
        ({"valid_from": "tomorrow"}, "valid_from"),
        ({"valid_from": "2030-01-01T00:00:00"}, "valid_from"),
        ({"valid_from": "2020-01-01T00:00:00Z"}, "valid_from"),
    ],
    ids=str,
)
async def test_prices_that_cannot_be_meant(rig: Rig, change: dict[str, Any], param: str) -> None:
    """422 that names the field, and no price is changed."""
    await put(rig, "/prices", PRICE)
    before = (await rig.tenant.get("/prices")).json()
    answer = await put(rig, "/prices", PRICE | change)
    assert answer.status_code == 422, answer.text
    assert error_of(answer).param == param
    assert (await rig.tenant.get("/prices")).json() == before


async def test_discounts_are_seen_by_whom_they_concern(rig: Rig) -> None:
    """A tenant sees its own, a stranger nothing, an admin everybody's; only an admin sets them."""
    tenant = (await rig.tenant.get("/credit")).json()["tenant"]
    given = await put(rig, "/discounts", {"tenant": tenant, "percent": "12.5", "kind": "prompt"})
    assert given.status_code == 200, given.text
    (own,) = (await rig.tenant.get("/discounts")).json()["discounts"]
    assert (own["percent"], own["model"], own["kind"]) == ("12.5", "*", "prompt")
    assert (await rig.stranger.get("/discounts")).json()["discounts"] == []
    assert (await rig.stranger.get("/discounts", tenant=tenant)).status_code == 403
    everybody = (await rig.admin.get("/discounts", tenant="*")).json()["discounts"]
    assert own in everybody
    body = {"tenant": tenant, "percent": "99"}
    refused = await rig.tenant.http.put("/river/v1/discounts", json=body)
    assert refused.status_code == 403
    ended = await put(rig, "/discounts", {"tenant": tenant, "percent": "0", "kind": "prompt"})
    (left,) = ended.json()["discounts"]
    assert left["valid_to"] is not None


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"tenant": "nobody"}, 404, "tenant"),
        ({"percent": "101"}, 422, "percent"),
        ({"percent": "-1"}, 422, "percent"),
        ({"percent": "0.0000001"}, 422, "percent"),
        ({"kind": "thought"}, 422, "kind"),
        ({"valid_from": "2020-01-01T00:00:00Z"}, 422, "valid_from"),
    ],
    ids=str,
)
async def test_discounts_that_cannot_be_meant(
    rig: Rig, change: dict[str, Any], status: int, param: str
) -> None:
    """An error that names the field, and nobody pays less."""
    tenant = (await rig.tenant.get("/credit")).json()["tenant"]
    answer = await put(rig, "/discounts", {"tenant": tenant, "percent": "5"} | change)
    assert answer.status_code == status, answer.text
    assert error_of(answer).param == param
    assert (await rig.tenant.get("/discounts")).json()["discounts"] == []


async def test_the_command_line(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`river prices` and `river discounts` set and list."""
    tenant = (await rig.tenant.get("/credit")).json()["tenant"]
    monkeypatch.setenv("RIVER_BASE_URL", rig.url)
    monkeypatch.setenv("RIVER_API_KEY", rig.admin.secret)

    async def invoke(*arguments: str) -> Any:
        result = await asyncio.to_thread(CliRunner().invoke, river, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    await invoke("prices", "set", "m", "storage", "0.2", "--context", "1")
    expected = ("m", "storage", "0.2")
    for command in (("prices",), ("prices", "list")):
        found = [
            (one["model"], one["kind"], one["usd_per_million"]) for one in await invoke(*command)
        ]
        assert expected in found
    await invoke("discounts", "set", tenant, "25", "--model", "m")
    (one,) = await invoke("discounts", "list", "--tenant", tenant)
    assert (one["percent"], one["model"], one["kind"]) == ("25", "m", "*")
