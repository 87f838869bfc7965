"""Single keys and tenants on the dashboard: rotated, limited and changed, with what is wrong beside its field."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from support.dashboard import signed_in
from support.gateway import Rig

from river_client import wire


async def _status(rig: Rig, secret: str) -> int:
    async with httpx.AsyncClient(base_url=rig.url) as client:
        headers = {"authorization": f"Bearer {secret}"}
        return (await client.get("/v1/models", headers=headers)).status_code


async def _key(rig: Rig) -> wire.ApiKey:
    """The tenant's key as the API has it."""
    (key,) = (await rig.admin.get("/keys", tenant=rig.tenant.tenant_id)).json()["keys"]
    return wire.ApiKey(**{**key, "limits": wire.Limits(**key.get("limits", {}))})


async def test_a_key_is_rotated(rig: Rig) -> None:
    """The new secret is on the page that answers and on no other; the old one goes on for the time that was chosen."""
    async with signed_in(rig, rig.admin) as window:
        path = f"/keys/{rig.tenant.key_id}"
        answer = await window.send("/keys/rotate", key_id=rig.tenant.key_id, grace_s="3600")
        assert answer.status_code == 200
        found = re.search(r'id="secret">(rv-[\w-]+)<', answer.text)
        assert found is not None
        assert "The old one goes on until" in answer.text
        assert found[1] not in await window.page(path)
        assert found[1] not in await window.page("/audit")
        assert await _status(rig, found[1]) == await _status(rig, rig.tenant.secret) == 200
        at_once = await window.send("/keys/rotate", key_id=rig.tenant.key_id, grace_s="0")
        assert "The old one has ended." in at_once.text
        assert await _status(rig, found[1]) == 401
        wrong = await window.send("/keys/rotate", key_id=rig.tenant.key_id, grace_s="604801")
        assert wrong.status_code == 422
        assert "must be 0 to 604800" in wrong.text


async def test_the_same_form_again_is_the_same_rotation(rig: Rig) -> None:
    """A second click or a reload ends the secret shown before, and what applications use goes on for its grace."""
    async with signed_in(rig, rig.admin) as window:
        page = await window.page(f"/keys/{rig.tenant.key_id}")
        identity = re.search(r'name="identity" value="([\w-]+)"', page)
        assert identity is not None
        form = {"key_id": rig.tenant.key_id, "grace_s": "3600", "identity": identity[1]}
        answers = [await window.send("/keys/rotate", **form) for _ in range(2)]
        secrets = [re.findall(r'id="secret">(rv-[\w-]+)<', one.text)[0] for one in answers]
        assert await _status(rig, secrets[0]) == 401
        assert await _status(rig, secrets[1]) == await _status(rig, rig.tenant.secret) == 200
        assert f'value="{identity[1]}"' not in answers[1].text


async def test_rights_limits_and_budget_are_changed(rig: Rig) -> None:
    """Each form changes what it shows, empty fields end limits, expiry and budget, and the page shows what is."""
    key_id = rig.tenant.key_id
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M")
    async with signed_in(rig, rig.admin) as window:
        for path, fields in (
            ("/keys/change", {"name": "app", "scopes": "infer", "expires_at": tomorrow}),
            ("/keys/limits", {"requests_per_minute": "1,200", "tokens_per_minute": ""}),
            ("/budgets", {"monthly_budget_nano_usd": "12.5"}),
        ):
            answer = await window.send(path, key_id=key_id, **fields)
            assert answer.headers["location"] == f"/admin/keys/{key_id}", answer.text
        key = await _key(rig)
        assert (key.name, key.scopes, key.limits) == (
            "app",
            ["infer"],
            wire.Limits(requests_per_minute=1200),
        )
        assert (key.expires_at or "").startswith(tomorrow)
        budgets = (await rig.admin.get("/budgets", tenant=rig.tenant.tenant_id)).json()["budgets"]
        assert [(one["key_id"], one["budget_nano_usd"]) for one in budgets] == [
            (key_id, 12_500_000_000)
        ]
        page = await window.page(f"/keys/{key_id}")
        for shown in ('value="1200"', 'value="12.5"', f'value="{tomorrow}"', 'value="app"'):
            assert shown in page
        await window.send("/keys/change", key_id=key_id, name="app", scopes="train", expires_at="")
        await window.send("/keys/limits", key_id=key_id, requests_per_minute="")
        await window.send("/budgets", key_id=key_id, monthly_budget_nano_usd="")
        key = await _key(rig)
        assert (key.scopes, key.expires_at, key.limits) == (["train"], None, wire.Limits())
        assert (await rig.admin.get("/budgets", tenant="tenant")).json()["budgets"] == []


@pytest.mark.parametrize(
    ("path", "field", "text", "said"),
    [
        ("/keys/change", "name", "", "must be 1 to"),
        ("/keys/change", "expires_at", "never", "is no ISO 8601 time"),
        ("/keys/limits", "requests_per_minute", "many", "is no whole number"),
        ("/keys/limits", "concurrent_requests", "0", "null is no limit"),
        ("/budgets", "monthly_budget_nano_usd", "-1", "must be 0 to"),
        ("/budgets", "monthly_budget_nano_usd", "1e999999", "is no decimal number"),
        ("/keys/limits", "tokens_per_minute", "9" * 5000, "is no whole number"),
        ("/budgets", "monthly_budget_nano_usd", "0.0000000001", "finer than a nano-dollar"),
    ],
)
async def test_what_is_wrong_is_beside_its_field(
    rig: Rig, path: str, field: str, text: str, said: str
) -> None:
    """The page comes back with what was typed, marked wrong, described by the sentence, and nothing is changed."""
    before = await _key(rig)
    async with signed_in(rig, rig.admin) as window:
        fields = {"name": "x"} | {field: text}
        answer = await window.send(path, key_id=rig.tenant.key_id, **fields)
    assert answer.status_code == 422
    inputs = re.findall(r"<input [^>]*aria-invalid=\"true\"[^>]*>", answer.text)
    assert len(inputs) == 1
    assert f'name="{field}"' in inputs[0]
    assert f'value="{text}"' in inputs[0]
    note = re.search(r'aria-describedby="([\w-]+)"', inputs[0])
    assert note is not None
    described = re.search(rf'id="{note[1]}" role="alert">([^<]+)<', answer.text)
    assert described is not None
    assert said in described[1]
    assert await _key(rig) == before


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("/keys", {"tenant": "tenant", "name": ""}, "name: 0 characters"),
        ("/keys", {"tenant": "tenant", "name": "n", "expires_at": "soon"}, "no ISO 8601 time"),
        ("/tenants", {"name": "stranger"}, "there is a tenant named"),
        ("/tenants", {"name": " "}, "name: 0 characters"),
    ],
    ids=str,
)
async def test_what_is_wrong_with_a_new_one(
    rig: Rig, path: str, fields: dict[str, str], said: str
) -> None:
    """A key or tenant that cannot be made is told beside the one field that is wrong, and none is made."""
    async with signed_in(rig, rig.admin) as window:
        answer = await window.send(path, **fields)
    assert answer.status_code == 422
    assert answer.text.count('aria-invalid="true"') == 1
    assert said in answer.text
    assert len((await rig.admin.get("/keys")).json()["keys"]) == 3
    assert len((await rig.admin.get("/tenants")).json()["tenants"]) == 3


async def test_a_tenant_is_limited(rig: Rig) -> None:
    """Limits over all keys, a budget and the time that completions are kept; its keys are listed with their use."""
    tenant_id = rig.tenant.tenant_id
    await _status(rig, rig.tenant.secret)
    async with signed_in(rig, rig.admin) as window:
        for path, fields in (
            ("/tenants/limits", {"tokens_per_minute": "5000"}),
            ("/tenants/retention", {"completions_kept_s": "7"}),
            ("/budgets", {"monthly_budget_nano_usd": "100"}),
        ):
            answer = await window.send(path, tenant_id=tenant_id, **fields)
            assert answer.headers["location"] == f"/admin/tenants/{tenant_id}", answer.text
        (tenant,) = [
            one
            for one in (await rig.admin.get("/tenants")).json()["tenants"]
            if one["tenant_id"] == tenant_id
        ]
        assert tenant["limits"] == {"tokens_per_minute": 5000}
        assert tenant["completions_kept_s"] == 7 * 86_400
        page = await window.page(f"/tenants/{tenant_id}")
        for shown in ('value="5000"', 'value="7"', 'value="100"', rig.tenant.key_id, "0 s ago"):
            assert shown in page
        wrong = await window.send("/tenants/limits", tenant_id=tenant_id, tokens_per_minute="x")
        assert wrong.status_code == 422
        assert "is no whole number" in wrong.text
        assert (await window.client.get("/admin/tenants/ten_0")).status_code == 404
        assert (await window.client.get("/admin/keys/key_0")).status_code == 404


async def test_keys_and_tenants_are_for_admins(rig: Rig) -> None:
    """A tenant's key opens none of these pages and sends none of these forms, not even about itself."""
    key = {"key_id": rig.tenant.key_id}
    async with signed_in(rig, rig.tenant) as window:
        for path in (f"/keys/{rig.tenant.key_id}", f"/tenants/{rig.tenant.tenant_id}"):
            assert (await window.client.get(f"/admin{path}")).status_code == 403
        for path in ("/keys/change", "/keys/limits", "/keys/rotate", "/budgets", "/prices"):
            assert (await window.send(path, **key)).status_code == 403
    assert await _status(rig, rig.tenant.secret) == 200
