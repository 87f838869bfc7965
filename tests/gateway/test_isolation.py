"""Another tenant's things do not exist: tested on every route there is, new ones included."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime

import httpx
import msgspec
from litestar.routes import HTTPRoute
from support.billing import make_event
from support.gateway import Rig, Tenant
from support.stand_ins import BASE

from river_billing.invoices import close_invoices
from river_billing.recorder import record_events
from river_client import feedback_wire, wire
from river_gateway.app import create_litestar


@dataclass(frozen=True)
class Things:
    """What the owner has, by id, path and name."""

    session_id: str
    run_id: str
    path: str
    key_id: str
    completion_id: str
    batch_id: str
    text_id: str
    invoice: str


async def _invoiced(rig: Rig) -> str:
    """The number of an invoice of the owner's."""
    async with rig.services.pool.acquire() as connection:
        used_at = datetime(2024, 10, 20, tzinfo=UTC)
        event = make_event(
            1, tenant_id=rig.tenant.tenant_id, occurred_at=used_at.timestamp(), prompt=5
        )
        await record_events(connection, [event])
        (invoice,) = await close_invoices(connection, rig.tenant.tenant_id, date(2024, 10, 1))
    return str(invoice.number)


async def _owned(rig: Rig) -> Things:
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "mine")
    for target in (BASE, f"river://{run.run_id}", saved.path):  # Two versions to go back to.
        put = await rig.tenant.http.put("/river/v1/aliases/mine", json={"target": target})
        assert put.status_code == 200
    chat = await rig.tenant.openai.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "x"}], store=True
    )
    text = await rig.tenant.openai.completions.create(
        model="mine", prompt="x", extra_body={"store": True}
    )
    for engine in rig.engines:
        engine.requests.clear()
    given = feedback_wire.GiveFeedback(
        feedback=[feedback_wire.Feedback(completion_id=chat.id, reward=1.0)]
    )
    assert (await rig.tenant.post("/feedback", given)).status_code == 204
    claimed = await rig.tenant.post("/feedback/batches", feedback_wire.ClaimFeedback(model="mine"))
    batch_id = claimed.json()["batch_id"]
    assert batch_id is not None
    return Things(
        run.session_id,
        run.run_id,
        saved.path,
        rig.tenant.key_id,
        chat.id,
        batch_id,
        text.id,
        await _invoiced(rig),
    )


Attempt = Callable[[Tenant, Things], Awaitable[list[httpx.Response]]]
River = "/river/v1"


def _call(method: str, path: str, body: object = None) -> Attempt:
    """One request, its path and body filled with the owner's things."""

    async def attempt(who: Tenant, things: Things) -> list[httpx.Response]:
        fill = {name: getattr(things, name) for name in things.__dataclass_fields__}
        content = b"" if body is None else msgspec.json.encode(body)
        for name, value in fill.items():
            content = content.replace(f"<{name}>".encode(), value.encode())
        url = path.format(**fill)
        return [await who.http.request(method, url, content=content)]

    return attempt


def _models(path: str, **body: object) -> Attempt:
    """One request for each name that the owner's models have."""

    async def attempt(who: Tenant, things: Things) -> list[httpx.Response]:
        names = (f"river://{things.run_id}", things.path, "mine")
        return [
            await who.http.request(
                "POST" if body else "GET",
                path.format(model=name),
                json={"model": name} | body if body else None,
            )
            for name in names
        ]

    return attempt


_FORWARD = {"seq": 1, "operation": {"kind": "forward", "data": [{"input_ids": [1, 2]}]}}
_STORED = "/v1/chat/completions"
_TEXTS = "/v1/completions"
_MESSAGES = [{"role": "user", "content": "x"}]


async def _signed(who: Tenant, things: Things) -> list[httpx.Response]:
    """A file by its signed URL; who is given none tries one that is made up."""
    given = await who.http.get(f"{River}/checkpoints/urls", params={"path": things.path})
    if given.status_code == 200:
        return [await who.http.get(url) for url in given.json()["urls"].values()]
    made_up = f"{River}/signed/ckpt_0/adapter_config.json?expires=9999999999&signature=00"
    return [given, await who.http.get(made_up)]


# (method, route) -> a stranger's attempt at the owner's thing; every answer must be 404.
ATTEMPTS: dict[tuple[str, str], Attempt] = {
    ("POST", "/v1/chat/completions"): _models("/v1/chat/completions", messages=_MESSAGES),
    ("GET", f"{_STORED}/{{completion_id:str}}"): _call("GET", _STORED + "/{completion_id}"),
    ("POST", f"{_STORED}/{{completion_id:str}}"): _call(
        "POST", _STORED + "/{completion_id}", {"metadata": {}}
    ),
    ("DELETE", f"{_STORED}/{{completion_id:str}}"): _call("DELETE", _STORED + "/{completion_id}"),
    ("GET", f"{_STORED}/{{completion_id:str}}/messages"): _call(
        "GET", _STORED + "/{completion_id}/messages"
    ),
    ("GET", f"{_TEXTS}/{{completion_id:str}}"): _call("GET", _TEXTS + "/{text_id}"),
    ("POST", f"{_TEXTS}/{{completion_id:str}}"): _call(
        "POST", _TEXTS + "/{text_id}", {"metadata": {}}
    ),
    ("DELETE", f"{_TEXTS}/{{completion_id:str}}"): _call("DELETE", _TEXTS + "/{text_id}"),
    ("POST", f"{River}/feedback"): _call(
        "POST",
        f"{River}/feedback",
        {"feedback": [{"completion_id": "<completion_id>", "reward": 1.0}]},
    ),
    ("POST", f"{River}/feedback/batches/{{batch_id:str}}/ack"): _call(
        "POST", River + "/feedback/batches/{batch_id}/ack"
    ),
    ("POST", "/v1/completions"): _models("/v1/completions", prompt="x"),
    ("POST", "/v1/responses"): _models("/v1/responses", input="x"),
    ("POST", "/v1/messages"): _models("/v1/messages", messages=_MESSAGES, max_tokens=2),
    ("POST", "/v1/messages/count_tokens"): _models("/v1/messages/count_tokens", messages=_MESSAGES),
    ("GET", "/v1/models/{model_id:path}"): _models("/v1/models/{model}"),
    ("GET", f"{River}/invoices/{{number:int}}"): _call("GET", River + "/invoices/{invoice}"),
    ("POST", f"{River}/sample"): _models(f"{River}/sample", prompts=["x"], max_tokens=2),
    ("POST", f"{River}/sessions/{{session_id:str}}/heartbeat"): _call(
        "POST", River + "/sessions/{session_id}/heartbeat"
    ),
    ("DELETE", f"{River}/sessions/{{session_id:str}}"): _call(
        "DELETE", River + "/sessions/{session_id}"
    ),
    ("POST", f"{River}/runs"): _call(
        "POST", f"{River}/runs", {"session_id": "<session_id>", "base_model": BASE}
    ),
    ("GET", f"{River}/runs/{{run_id:str}}"): _call("GET", River + "/runs/{run_id}"),
    ("POST", f"{River}/runs/{{run_id:str}}/metrics"): _call(
        "POST", River + "/runs/{run_id}/metrics", {"metrics": {"a": 1}}
    ),
    ("POST", f"{River}/runs/{{run_id:str}}/samples"): _call(
        "POST",
        River + "/runs/{run_id}/samples",
        {"groups": [{"prompt": "x", "completions": []}]},
    ),
    ("GET", f"{River}/runs/{{run_id:str}}/samples"): _call("GET", River + "/runs/{run_id}/samples"),
    ("PUT", f"{River}/runs/{{run_id:str}}/learning"): _call(
        "PUT", River + "/runs/{run_id}/learning", {"alias": "theirs", "adam": {"lr": 0.1}}
    ),
    ("GET", f"{River}/runs/{{run_id:str}}/learning"): _call(
        "GET", River + "/runs/{run_id}/learning"
    ),
    ("DELETE", f"{River}/runs/{{run_id:str}}/learning"): _call(
        "DELETE", River + "/runs/{run_id}/learning"
    ),
    ("POST", f"{River}/runs/{{run_id:str}}/operations"): _call(
        "POST", River + "/runs/{run_id}/operations", _FORWARD
    ),
    ("GET", f"{River}/operations/{{operation_id:str}}"): _call(
        "GET", River + "/operations/{run_id}-1"
    ),
    ("GET", f"{River}/checkpoints"): _call("GET", River + "/checkpoints?path={path}"),
    ("PATCH", f"{River}/checkpoints"): _call(
        "PATCH", River + "/checkpoints?path={path}", {"ttl_s": 60}
    ),
    ("POST", f"{River}/checkpoints/public"): _call(
        "POST", River + "/checkpoints/public?path={path}"
    ),
    ("DELETE", f"{River}/checkpoints/public"): _call(
        "DELETE", River + "/checkpoints/public?path={path}"
    ),
    ("POST", f"{River}/checkpoints/copy"): _call(
        "POST", f"{River}/checkpoints/copy", {"path": "<path>"}
    ),
    ("GET", f"{River}/checkpoints/urls"): _call("GET", River + "/checkpoints/urls?path={path}"),
    ("GET", f"{River}/signed/{{checkpoint_id:str}}/{{name:str}}"): _signed,
    ("DELETE", f"{River}/checkpoints"): _call("DELETE", River + "/checkpoints?path={path}"),
    ("GET", f"{River}/checkpoints/files"): _call("GET", River + "/checkpoints/files?path={path}"),
    ("GET", f"{River}/checkpoints/file"): _call(
        "GET", River + "/checkpoints/file?path={path}&name=adapter_config.json"
    ),
    ("PUT", f"{River}/aliases/{{name:str}}"): _call(
        "PUT", f"{River}/aliases/theirs", {"target": "<path>"}
    ),
    ("GET", f"{River}/aliases/{{name:str}}"): _call("GET", f"{River}/aliases/mine"),
    ("GET", f"{River}/aliases/{{name:str}}/history"): _call("GET", f"{River}/aliases/mine/history"),
    ("POST", f"{River}/aliases/{{name:str}}/rollback"): _call(
        "POST", f"{River}/aliases/mine/rollback"
    ),
    ("DELETE", f"{River}/aliases/{{name:str}}"): _call("DELETE", f"{River}/aliases/mine"),
}

# Routes that take nobody's thing, with what a stranger is shown.
NOTHING_TO_GUESS = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/chat/completions"),
    ("GET", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", f"{River}/sessions"),
    ("POST", f"{River}/checkpoints/import"),
    ("GET", f"{River}/runs"),
    ("GET", f"{River}/aliases"),
    ("GET", f"{River}/learning"),
    ("POST", f"{River}/feedback/batches"),
    ("GET", f"{River}/models"),
    ("GET", f"{River}/usage"),
    ("GET", f"{River}/usage/series"),
    ("GET", f"{River}/invoices"),
    ("GET", f"{River}/invoices/open"),
    ("GET", f"{River}/prices"),
    ("GET", f"{River}/discounts"),
    ("GET", f"{River}/credit"),
    ("GET", f"{River}/credit/entries"),
    ("GET", f"{River}/budgets"),
    ("GET", f"{River}/audit"),
}

# Routes for administrators alone, who see all tenants.
ADMIN_ONLY: dict[tuple[str, str], Attempt] = {
    ("GET", f"{River}/engines"): _call("GET", f"{River}/engines"),
    ("GET", f"{River}/trainers"): _call("GET", f"{River}/trainers"),
    **{
        ("POST", f"{River}/{kind}s/{{{kind}_id:str}}/{action}"): _call(
            "POST", f"{River}/{kind}s/{name}/{action}"
        )
        for kind, name in (("engine", "eng_0"), ("trainer", "trn_1"))
        for action in ("drain", "undrain", "restart")
    },
    ("POST", f"{River}/tenants"): _call("POST", f"{River}/tenants", {"name": "x"}),
    ("GET", f"{River}/tenants"): _call("GET", f"{River}/tenants"),
    ("POST", f"{River}/keys"): _call("POST", f"{River}/keys", {"tenant": "tenant"}),
    ("PATCH", f"{River}/tenants/{{tenant:str}}/limits"): _call(
        "PATCH", f"{River}/tenants/tenant/limits", {"requests_per_minute": 1}
    ),
    ("PATCH", f"{River}/tenants/{{tenant:str}}/retention"): _call(
        "PATCH", f"{River}/tenants/tenant/retention", {"completions_kept_s": 0}
    ),
    ("PATCH", f"{River}/keys/{{key_id:str}}/limits"): _call(
        "PATCH", River + "/keys/{key_id}/limits", {"requests_per_minute": 1}
    ),
    ("GET", f"{River}/keys"): _call("GET", f"{River}/keys"),
    ("POST", f"{River}/credit"): _call(
        "POST", f"{River}/credit", {"tenant": "tenant", "amount_nano_usd": 1, "reference": "x"}
    ),
    ("PUT", f"{River}/prices"): _call(
        "PUT",
        f"{River}/prices",
        {"model": "m", "context_length": 1, "kind": "prompt", "usd_per_million": "1"},
    ),
    ("PUT", f"{River}/discounts"): _call(
        "PUT", f"{River}/discounts", {"tenant": "tenant", "percent": "1"}
    ),
    ("PUT", f"{River}/credit/billing"): _call(
        "PUT", f"{River}/credit/billing", {"tenant": "tenant", "billing": "prepaid"}
    ),
    ("POST", f"{River}/invoices"): _call(
        "POST", f"{River}/invoices", {"tenant": "tenant", "month": "2024-10"}
    ),
    ("PUT", f"{River}/budgets"): _call(
        "PUT", f"{River}/budgets", {"key_id": "<key_id>", "monthly_budget_nano_usd": 1}
    ),
    ("PATCH", f"{River}/keys/{{key_id:str}}"): _call("PATCH", River + "/keys/{key_id}", {}),
    ("POST", f"{River}/keys/{{key_id:str}}/rotate"): _call(
        "POST", River + "/keys/{key_id}/rotate", {}
    ),
    ("DELETE", f"{River}/keys/{{key_id:str}}"): _call("DELETE", River + "/keys/{key_id}"),
}


def _all_routes(rig: Rig) -> set[tuple[str, str]]:
    return {
        (method, route.path)
        for route in create_litestar(rig.services).routes
        if isinstance(route, HTTPRoute)
        and not route.path.startswith(("/schema", "/admin", "/api/v1"))
        for method in route.methods
        if method != "OPTIONS"
    }


async def test_every_route_is_tested_here(rig: Rig) -> None:
    """A new route fails this test until its isolation is tested below.

    Those of the dashboard are in test_dashboard.py, those of the Tinker dialect in test_tinker_isolation.py.
    """
    tested = {*ATTEMPTS, *NOTHING_TO_GUESS, *ADMIN_ONLY}
    assert {(method, path) for method, path in _all_routes(rig)} == tested
    assert not any("{" in path for _, path in NOTHING_TO_GUESS)


async def test_a_stranger_gets_404_everywhere(rig: Rig) -> None:
    """On every route that takes an id, path or name, another tenant's is answered exactly as one nobody has."""
    things = await _owned(rig)
    nothing = Things(
        "ses_0", "run_0", "river://run_0/weights/x", "key_0", "chatcmpl-0", "bat_0", "cmpl-0", "999"
    )
    for (method, route), attempt in ATTEMPTS.items():
        theirs = await attempt(rig.stranger, things)
        nobodys = await attempt(rig.stranger, nothing)
        for answer in [*theirs, *nobodys]:
            assert answer.status_code == 404, (method, route, answer.text)
        for answer, unknown in zip(theirs, nobodys, strict=True):
            assert _shape(answer) == _shape(unknown), (method, route)
    assert not any(engine.requests or engine.samples for engine in rig.engines)
    assert len(rig.trainer.messages) == 2


def _shape(answer: httpx.Response) -> dict[str, object]:
    """The error without what differs from one request to the next."""
    error = answer.json()["error"]
    return {name: value for name, value in error.items() if name not in ("message", "request_id")}


async def test_a_stranger_s_lists_are_empty(rig: Rig) -> None:
    """No list shows another tenant's things."""
    await _owned(rig)
    for noun in ("runs", "checkpoints", "aliases", "usage", "invoices"):
        assert (await rig.stranger.get(f"/{noun}")).json()[noun] == []
        if noun != "usage":
            assert len((await rig.tenant.get(f"/{noun}")).json()[noun]) == 1


async def test_the_owner_is_not_refused(rig: Rig) -> None:
    """The same attempts succeed for the owner, so that the 404s above mean something."""
    things = await _owned(rig)
    last = ("DELETE",)
    for method, route in sorted(ATTEMPTS, key=lambda key: key[0] in last):
        if method == "DELETE" and "checkpoints" in route:
            continue
        for answer in await ATTEMPTS[method, route](rig.tenant, things):
            assert answer.status_code < 300, (method, route, answer.text)
    assert (await ATTEMPTS["DELETE", f"{River}/checkpoints"](rig.tenant, things))[
        0
    ].status_code == 204


async def test_administration_is_for_administrators(rig: Rig) -> None:
    """A tenant's key is 403 on every administration route, whether the thing exists or not."""
    things = await _owned(rig)
    for attempt in ADMIN_ONLY.values():
        for answer in await attempt(rig.stranger, things):
            assert answer.status_code == 403


async def test_a_tenant_s_alias_is_its_own(rig: Rig) -> None:
    """Two tenants may use one name; each gets its own."""
    await _owned(rig)
    run = await rig.stranger.new_run()
    target = f"river://{run.run_id}"
    answer = await rig.stranger.http.put(f"{River}/aliases/mine", json={"target": target})
    assert answer.status_code == 200
    await rig.stranger.http.delete(f"{River}/aliases/mine")
    aliases = msgspec.convert((await rig.tenant.get("/aliases")).json(), wire.Page).aliases
    assert aliases is not None
    assert len(aliases) == 1
