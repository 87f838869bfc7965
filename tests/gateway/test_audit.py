"""The audit log: every route that changes something leaves its line, which nobody can change and only some may read."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import httpx
import msgspec
import pytest
from litestar.routes import HTTPRoute
from support.audit import audit_lines
from support.billing import make_event
from support.dashboard import Window, signed_in
from support.gateway import Rig
from support.stand_ins import BASE

from river_billing.recorder import record_events
from river_client import wire
from river_gateway.app import create_litestar

API = "/river/v1"


@dataclass(frozen=True)
class World:
    """A gateway in use: what its tenant has, and an admin's window on the dashboard."""

    rig: Rig
    window: Window
    run_id: str
    paths: list[str]

    async def beat(self) -> None:
        """Engines and trainers are alive, however long the test has taken so far."""
        await self.rig.register(self.rig.engines[0].record())
        await self.rig.register_trainer(self.rig.trainer.record())

    async def spare_key(self) -> str:
        """The id of another key of the tenant."""
        asked = wire.CreateKey(tenant=self.rig.tenant.tenant_id, name="spare")
        return (await self.rig.admin.post("/keys", asked)).json()["key_id"]

    async def point(self, name: str) -> None:
        """An alias with a version to go back to, if there is none of that name."""
        if (await self.rig.tenant.get(f"/aliases/{name}")).status_code == 200:
            return
        for target in (BASE, self.paths[0]):
            await self.rig.tenant.http.put(f"{API}/aliases/{name}", json={"target": target})


Act = Callable[[World], Awaitable[httpx.Response]]


def _by_admin(method: str, path: str, body: object = None) -> Act:
    """A request of the admin's about the tenant, whose names are filled in."""

    async def act(world: World) -> httpx.Response:
        text = json.dumps(body).replace("<tenant>", world.rig.tenant.tenant_id)
        url = API + path.replace("<tenant>", world.rig.tenant.tenant_id)
        if "<key>" in url + text:
            key_id = await world.spare_key()
            url, text = url.replace("<key>", key_id), text.replace("<key>", key_id)
        content = b"" if body is None else text.encode()
        await world.beat()
        return await world.rig.admin.http.request(method, url, content=content)

    return act


def _by_tenant(method: str, path: str, body: object = None) -> Act:
    """A request of the tenant's about its own run, alias or checkpoint."""

    async def act(world: World) -> httpx.Response:
        await world.point("mine")
        path_filled = path.replace("<run>", world.run_id).replace("<path>", world.paths[-1])
        text = json.dumps(body).replace("<path>", world.paths[-1])
        content = b"" if body is None else text.encode()
        return await world.rig.tenant.http.request(method, API + path_filled, content=content)

    return act


def _on_page(page: str, **fields: str) -> Act:
    """A form of the dashboard, sent by an admin."""

    async def act(world: World) -> httpx.Response:
        await world.point("shown")
        fills = {
            "<tenant>": world.rig.tenant.tenant_id,
            "<path>": world.paths[0],
            "<run>": world.run_id,
        }
        if "<key>" in fields.values():
            fills["<key>"] = await world.spare_key()
        form = {name: fills.get(value, value) for name, value in fields.items()}
        await world.beat()
        return await world.window.send(page, **form)

    return act


async def _start_to_learn(world: World) -> httpx.Response:
    """The dashboard's form, sent by the run's own tenant."""
    form = {"run_id": world.run_id, "alias": "taught", "lr": "0.1", "min_batch": "2"}
    async with signed_in(world.rig, world.rig.tenant) as window:
        return await window.send("/learning/start", **form, max_batch="4", publish="live")


async def _close_a_month(world: World) -> httpx.Response:
    tenant_id = world.rig.tenant.tenant_id
    async with world.rig.services.pool.acquire() as connection:
        used_at = datetime(2024, 10, 20, tzinfo=UTC).timestamp()
        event = make_event(1, tenant_id=tenant_id, occurred_at=used_at, prompt=5)
        await record_events(connection, [event])
    return await world.rig.admin.http.post(
        f"{API}/invoices", json={"tenant": tenant_id, "month": "2024-10"}
    )


_PRICE = {"model": "m", "context_length": 1, "kind": "prompt", "usd_per_million": "1"}
_CREDIT = {"tenant": "<tenant>", "amount_nano_usd": 5, "reference": "x"}
_BUDGET = {"tenant": "<tenant>", "monthly_budget_nano_usd": 10**15}
_LEARN = {"alias": "taught", "adam": {"lr": 0.1}}

# (method, route) -> how it is used, and the action that the log then has. In this order: the last ones destroy.
ACTIONS: dict[tuple[str, str], tuple[Act, str]] = {
    ("POST", f"{API}/tenants"): (_by_admin("POST", "/tenants", {"name": "new"}), "tenants.create"),
    ("PATCH", f"{API}/tenants/{{tenant:str}}/limits"): (
        _by_admin("PATCH", "/tenants/<tenant>/limits", {"requests_per_minute": 10**6}),
        "tenants.limits",
    ),
    ("PATCH", f"{API}/tenants/{{tenant:str}}/retention"): (
        _by_admin("PATCH", "/tenants/<tenant>/retention", {"completions_kept_s": 60}),
        "tenants.retention",
    ),
    ("POST", f"{API}/keys"): (_by_admin("POST", "/keys", {"tenant": "<tenant>"}), "keys.create"),
    ("PATCH", f"{API}/keys/{{key_id:str}}"): (
        _by_admin("PATCH", "/keys/<key>", {"scopes": ["infer"]}),
        "keys.change",
    ),
    ("PATCH", f"{API}/keys/{{key_id:str}}/limits"): (
        _by_admin("PATCH", "/keys/<key>/limits", {"concurrent_requests": 3}),
        "keys.limits",
    ),
    ("POST", f"{API}/keys/{{key_id:str}}/rotate"): (
        _by_admin("POST", "/keys/<key>/rotate", {"grace_s": 60}),
        "keys.rotate",
    ),
    ("DELETE", f"{API}/keys/{{key_id:str}}"): (_by_admin("DELETE", "/keys/<key>"), "keys.revoke"),
    ("PUT", f"{API}/prices"): (_by_admin("PUT", "/prices", _PRICE), "prices.set"),
    ("PUT", f"{API}/discounts"): (
        _by_admin("PUT", "/discounts", {"tenant": "<tenant>", "percent": "5"}),
        "discounts.set",
    ),
    ("POST", f"{API}/credit"): (_by_admin("POST", "/credit", _CREDIT), "credit.add"),
    ("PUT", f"{API}/credit/billing"): (
        _by_admin("PUT", "/credit/billing", {"tenant": "<tenant>", "billing": "postpaid"}),
        "credit.billing",
    ),
    ("PUT", f"{API}/budgets"): (_by_admin("PUT", "/budgets", _BUDGET), "budgets.set"),
    ("POST", f"{API}/invoices"): (_close_a_month, "invoices.close"),
    ("PUT", f"{API}/aliases/{{name:str}}"): (
        _by_tenant("PUT", "/aliases/other", {"target": BASE}),
        "aliases.put",
    ),
    ("POST", f"{API}/aliases/{{name:str}}/rollback"): (
        _by_tenant("POST", "/aliases/mine/rollback"),
        "aliases.rollback",
    ),
    ("DELETE", f"{API}/aliases/{{name:str}}"): (
        _by_tenant("DELETE", "/aliases/mine"),
        "aliases.delete",
    ),
    ("PUT", f"{API}/runs/{{run_id:str}}/learning"): (
        _by_tenant("PUT", "/runs/<run>/learning", _LEARN),
        "learning.start",
    ),
    ("DELETE", f"{API}/runs/{{run_id:str}}/learning"): (
        _by_tenant("DELETE", "/runs/<run>/learning"),
        "learning.stop",
    ),
    ("POST", f"{API}/checkpoints/public"): (
        _by_tenant("POST", "/checkpoints/public?path=<path>"),
        "checkpoints.publish",
    ),
    ("DELETE", f"{API}/checkpoints/public"): (
        _by_tenant("DELETE", "/checkpoints/public?path=<path>"),
        "checkpoints.unpublish",
    ),
    ("POST", f"{API}/checkpoints/copy"): (
        _by_tenant("POST", "/checkpoints/copy", {"path": "<path>"}),
        "checkpoints.copy",
    ),
    ("PATCH", f"{API}/checkpoints"): (
        _by_tenant("PATCH", "/checkpoints?path=<path>", {"ttl_s": 3600}),
        "checkpoints.ttl",
    ),
    ("DELETE", f"{API}/checkpoints"): (
        _by_tenant("DELETE", "/checkpoints?path=<path>"),
        "checkpoints.delete",
    ),
    **{
        ("POST", f"{API}/{kind}s/{{{kind}_id:str}}/{action}"): (
            _by_admin("POST", f"/{kind}s/{name}/{action}"),
            f"{kind}s.{action}",
        )
        for kind, name in (("engine", "eng_0"), ("trainer", "trn_1"))
        for action in ("drain", "undrain")
    },
    ("POST", f"{API}/engines/{{engine_id:str}}/restart"): (
        _by_admin("POST", "/engines/eng_0/restart"),
        "engines.restart",
    ),
    ("POST", "/admin/machines/engines/{engine_id:str}"): (
        _on_page("/machines/engines/eng_0", action="restart", confirmation="eng_0"),
        "engines.restart",
    ),
    ("POST", "/admin/machines/trainers/{trainer_id:str}"): (
        _on_page("/machines/trainers/trn_1", action="drain"),
        "trainers.drain",
    ),
    ("POST", f"{API}/trainers/{{trainer_id:str}}/restart"): (
        _by_admin("POST", "/trainers/trn_1/restart"),
        "trainers.restart",
    ),
    ("POST", "/admin/keys"): (
        _on_page("/keys", tenant="<tenant>", name="k", scopes="infer"),
        "keys.create",
    ),
    ("POST", "/admin/keys/revoke"): (_on_page("/keys/revoke", key_id="<key>"), "keys.revoke"),
    ("POST", "/admin/keys/change"): (
        _on_page("/keys/change", key_id="<key>", name="n", scopes="infer"),
        "keys.change",
    ),
    ("POST", "/admin/keys/limits"): (
        _on_page("/keys/limits", key_id="<key>", requests_per_minute="5"),
        "keys.limits",
    ),
    ("POST", "/admin/keys/rotate"): (
        _on_page("/keys/rotate", key_id="<key>", grace_s="3600"),
        "keys.rotate",
    ),
    ("POST", "/admin/tenants/limits"): (
        _on_page("/tenants/limits", tenant_id="<tenant>", requests_per_minute="1,000,000"),
        "tenants.limits",
    ),
    ("POST", "/admin/tenants/retention"): (
        _on_page("/tenants/retention", tenant_id="<tenant>", completions_kept_s="30"),
        "tenants.retention",
    ),
    ("POST", "/admin/budgets"): (
        _on_page("/budgets", tenant_id="<tenant>", monthly_budget_nano_usd="1000000"),
        "budgets.set",
    ),
    ("POST", "/admin/prices"): (
        _on_page("/prices", model="m2", context_length="9", kind="prompt", usd_per_million="1"),
        "prices.set",
    ),
    ("POST", "/admin/discounts"): (
        _on_page("/discounts", tenant="<tenant>", percent="5", kind="*", model="m2"),
        "discounts.set",
    ),
    ("POST", "/admin/tenants"): (_on_page("/tenants", name="shown"), "tenants.create"),
    ("POST", "/admin/checkpoint/promote"): (
        _on_page("/checkpoint/promote", path="<path>", alias="best"),
        "aliases.put",
    ),
    ("POST", "/admin/aliases/roll-back"): (
        _on_page("/aliases/roll-back", tenant="<tenant>", alias="shown", version="2"),
        "aliases.rollback",
    ),
    ("POST", "/admin/checkpoint/ttl"): (
        _on_page("/checkpoint/ttl", path="<path>", keep="days", days="7"),
        "checkpoints.ttl",
    ),
    ("POST", "/admin/learning/again"): (
        _on_page("/learning/again", run_id="<run>"),
        "learning.start",
    ),
    ("POST", "/admin/learning/stop"): (_on_page("/learning/stop", run_id="<run>"), "learning.stop"),
    ("POST", "/admin/learning/start"): (_start_to_learn, "learning.start"),
    ("POST", "/admin/checkpoint/delete"): (
        _on_page("/checkpoint/delete", path="<path>", confirmation="first"),
        "checkpoints.delete",
    ),
}

# What trains, samples and signs in: work and its results, which the catalog, the journal and the ledger have.
WORK = {
    ("POST", f"{API}/sessions"),
    ("POST", f"{API}/sessions/{{session_id:str}}/heartbeat"),
    ("DELETE", f"{API}/sessions/{{session_id:str}}"),
    ("POST", f"{API}/runs"),
    ("POST", f"{API}/runs/{{run_id:str}}/metrics"),
    ("POST", f"{API}/runs/{{run_id:str}}/samples"),
    ("POST", f"{API}/runs/{{run_id:str}}/operations"),
    ("POST", f"{API}/sample"),
    ("POST", f"{API}/feedback"),
    ("POST", f"{API}/feedback/batches"),
    ("POST", f"{API}/feedback/batches/{{batch_id:str}}/ack"),
    ("POST", f"{API}/checkpoints/import"),
    ("POST", "/admin/chat"),
    ("POST", "/admin/sign-in"),
    ("POST", "/admin/sign-out"),
}


def _changing_routes(rig: Rig) -> set[tuple[str, str]]:
    return {
        (method, route.path)
        for route in create_litestar(rig.services).routes
        if isinstance(route, HTTPRoute) and route.path.startswith((API, "/admin"))
        for method in route.methods
        if method in ("POST", "PUT", "PATCH", "DELETE")
    }


async def test_every_route_that_changes_something_leaves_a_line(rig: Rig) -> None:
    """Each is used once and has then its line, with who, whom, what and which request; a new route fails this test."""
    assert _changing_routes(rig) == {*ACTIONS, *WORK}
    run = await rig.tenant.new_run()
    saved = [
        await rig.tenant.save(run.run_id, seq, name)
        for seq, name in enumerate(("first", "last"), 1)
    ]
    async with signed_in(rig, rig.admin) as window:
        world = World(rig, window, run.run_id, [one.path for one in saved])
        for (method, route), (act, action) in ACTIONS.items():
            answer = await act(world)
            assert answer.status_code < 400, (method, route, answer.text)
            request_id = answer.headers["x-request-id"]
            lines = [one for one in await audit_lines(rig) if one.request_id == request_id]
            # Learning lets its alias follow the run as well.
            (entry,) = [one for one in lines if one.action == action] or [None]
            assert entry is not None, (method, route, lines)
            on_page = route.startswith("/admin")
            sent = answer.request.headers["cookie" if on_page else "authorization"]
            by_admin = rig.admin.secret in sent
            who = rig.admin if by_admin else rig.tenant
            assert (entry.key_id, entry.key_tenant, entry.key_name) == (
                who.key_id,
                who.tenant_id,
                "default",
            )
            assert entry.through == ("dashboard" if on_page else "api")
            assert entry.subject
            of_everybody = action.startswith(("engines.", "trainers."))
            if action not in ("prices.set", "tenants.create") and not of_everybody:
                assert (entry.tenant, entry.tenant_name) == (rig.tenant.tenant_id, "tenant")


async def test_no_line_has_a_secret(rig: Rig) -> None:
    """The secrets of a new and a rotated key are in no line, nor what they are stored as."""
    asked = wire.CreateKey(tenant=rig.tenant.tenant_id)
    made = (await rig.admin.post("/keys", asked)).json()
    rotated = await rig.admin.post(f"/keys/{made['key_id']}/rotate", wire.RotateKey(grace_s=9))
    log = msgspec.json.encode(await audit_lines(rig)).decode()
    assert made["key_id"] in log
    for secret in (made["secret"], rotated.json()["secret"]):
        assert secret not in log
        assert secret[3:] not in log


async def test_what_is_refused_leaves_no_line(rig: Rig) -> None:
    """An action and its line are one transaction: what was wrong, unknown, taken or not allowed is in no line."""
    admin, tenant_id = rig.admin.http, rig.tenant.tenant_id
    refused = [
        await admin.post(f"{API}/tenants", json={"name": "tenant"}),
        await admin.post(f"{API}/keys", json={"tenant": "nobody"}),
        await admin.delete(f"{API}/keys/key_0"),
        await admin.post(f"{API}/keys/key_0/rotate", json={}),
        await admin.put(f"{API}/prices", json=_PRICE | {"usd_per_million": "-1"}),
        await admin.put(f"{API}/discounts", json={"tenant": tenant_id, "percent": "0.0000001"}),
        await admin.post(
            f"{API}/credit", json=_CREDIT | {"tenant": tenant_id, "amount_nano_usd": 0}
        ),
        await admin.post(f"{API}/invoices", json={"tenant": tenant_id, "month": "2999-01"}),
        await rig.tenant.http.post(f"{API}/tenants", json={"name": "mine"}),
        await rig.tenant.http.put(f"{API}/aliases/x", json={"target": "river://run_0"}),
        await rig.tenant.http.post(f"{API}/aliases/x/rollback"),
        await rig.tenant.http.delete(f"{API}/checkpoints?path=river://run_0/weights/x"),
    ]
    assert all(answer.status_code >= 400 for answer in refused)
    assert await audit_lines(rig) == []


async def test_the_log_cannot_be_changed(rig: Rig, postgres_url: str) -> None:
    """Postgres refuses to change, delete or empty lines, whoever asks."""
    await rig.admin.post("/tenants", wire.CreateTenant(name="new"))
    connection = await asyncpg.connect(postgres_url)
    try:
        for statement in (
            "update audit_log set action = 'keys.create'",
            "delete from audit_log",
            "truncate audit_log",
        ):
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(statement)
    finally:
        await connection.close()
    assert len(await audit_lines(rig)) == 1
