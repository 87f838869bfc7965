"""The dashboard as a browser's requests see it: signing in, who sees what, forms of other sites, and what changes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
from litestar.routes import HTTPRoute
from support.dashboard import csrf_token, signed_in
from support.gateway import Rig

from river_client import wire
from river_gateway.app import create_litestar
from river_gateway.dashboard.signing_in import own_path

SIGN_IN = "/admin/sign-in"


@asynccontextmanager
async def browser(rig: Rig) -> AsyncGenerator[httpx.AsyncClient]:
    """A client with a cookie jar, not signed in."""
    async with httpx.AsyncClient(base_url=rig.url) as client:
        yield client


async def test_signing_in_and_out(rig: Rig) -> None:
    """A key opens the pages until the browser forgets it."""
    async with browser(rig) as client:
        asked = await client.get("/admin/runs?status=open")
        assert asked.status_code == 303
        assert asked.headers["location"] == f"{SIGN_IN}?next=/admin/runs%3Fstatus%3Dopen"
        data = {"key": rig.tenant.secret, "next": "/admin/runs?status=open"}
        answer = await client.post(SIGN_IN, data=data)
        assert answer.headers["location"] == "/admin/runs?status=open"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Path=/admin" in cookie
        page = await client.get("/admin")
        assert page.status_code == 200
        left = await client.post("/admin/sign-out", data={"csrf_token": csrf_token(page.text)})
        assert left.headers["location"] == SIGN_IN
        assert (await client.get("/admin")).status_code == 303


@pytest.mark.parametrize("key", ["", "rv-no-such-key", "sk-other", "rv-" + "x" * 5000])
async def test_a_bad_key_is_told_so(rig: Rig, key: str) -> None:
    """The page is shown again with the reason, and no cookie is set."""
    async with browser(rig) as client:
        answer = await client.post(SIGN_IN, data={"key": key})
        assert answer.status_code == 401
        assert 'role="alert"' in answer.text
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "path", ["https://elsewhere", "//elsewhere", "/admin//elsewhere", "/admin\\..", "/v1", ""]
)
def test_signing_in_never_leads_elsewhere(path: str) -> None:
    """What the address asks to be led to is a page of ours or nothing."""
    assert own_path(path) == "/admin"
    assert own_path("/admin/runs?search=a") == "/admin/runs?search=a"


async def test_forms_of_other_sites_are_refused(rig: Rig) -> None:
    """Neither the browser's word, nor a missing token, nor another viewer's lets a form through."""
    async with signed_in(rig, rig.tenant) as window, signed_in(rig, rig.stranger) as other:
        client = window.client
        for form, headers in (
            ({}, {}),
            ({"csrf_token": other.token}, {}),
            ({"csrf_token": "é"}, {}),
            ({}, {"sec-fetch-site": "cross-site"}),
            ({}, {"origin": "https://elsewhere"}),
        ):
            answer = await client.post("/admin/sign-out", data=form, headers=headers)
            assert answer.status_code == 403, (form, headers)
        for headers in ({"sec-fetch-site": "same-site"}, {"origin": "https://elsewhere"}):
            refused = await client.post(SIGN_IN, data={"key": rig.tenant.secret}, headers=headers)
            assert refused.status_code == 403
        assert (await client.get("/admin")).status_code == 200


async def test_pages_allow_nothing_but_their_own(rig: Rig) -> None:
    """Every page forbids scripts and styles from elsewhere and inline, framing, and keeping it in a cache."""
    async with signed_in(rig, rig.tenant) as window:
        client = window.client
        for path in ("/admin", "/admin/runs", SIGN_IN, "/admin/runs/run_0"):
            answer = await client.get(path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["cache-control"] == "no-store"
            assert not re.search(r"<script(?![^>]* src=)|<[^>]* (style|on\w+)=", answer.text)
            assert not re.search(r"(src|href)=\"(https?:)?//", answer.text)


async def test_static_files_are_kept_by_their_content(rig: Rig) -> None:
    """A file is found by its own digest only, and may be kept for ever; it needs no key."""
    async with browser(rig) as client:
        page = (await client.get(SIGN_IN)).text
        found = re.findall(r'(?:src|href)="(/admin/static/[^"]+)"', page)
        assert len(found) >= 5
        for url in found:
            answer = await client.get(url)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
        old = re.sub(r"/static/\w+/", "/static/000000000000/", found[0])
        assert (await client.get(old)).status_code == 404


async def test_a_tenant_sees_its_own(rig: Rig) -> None:
    """Another tenant's run is not in the list, and answered as one that nobody has; an admin sees both."""
    mine = await rig.tenant.new_run()
    theirs = await rig.stranger.new_run()
    async with signed_in(rig, rig.tenant) as window:
        client = window.client
        page = (await client.get("/admin/runs")).text
        assert mine.run_id in page
        assert theirs.run_id not in page
        assert (await client.get(f"/admin/runs/{mine.run_id}")).status_code == 200
        paths = (f"/admin/runs/{theirs.run_id}", f"/admin/runs/{mine.run_id}?with={theirs.run_id}")
        for path in (*paths, f"/admin/runs/{theirs.run_id}/series"):
            answer = await client.get(path)
            assert answer.status_code == 404, path
            assert rig.stranger.tenant_id not in answer.text
        for path in (f"/admin/runs/{theirs.run_id}/live", "/admin/runs/run_0/live"):
            assert (await client.get(path)).status_code == 404
        # The parameter is an admin's.
        assert (
            theirs.run_id
            not in (await client.get(f"/admin/runs?tenant={rig.stranger.tenant_id}")).text
        )
    async with signed_in(rig, rig.admin) as window:
        client = window.client
        page = (await client.get("/admin/runs")).text
        assert mine.run_id in page
        assert theirs.run_id in page
        one = (await client.get(f"/admin/runs?tenant={rig.stranger.tenant_id}")).text
        assert theirs.run_id in one
        assert mine.run_id not in one


async def test_every_page_needs_a_key(rig: Rig) -> None:
    """A route that shows something to nobody in particular fails this test."""
    open_to_all = {"/admin/sign-in", "/admin/static/{digest:str}/{name:str}"}
    routes = {
        (method, route.path)
        for route in create_litestar(rig.services).routes
        if isinstance(route, HTTPRoute) and route.path.startswith("/admin")
        for method in route.methods
        if method != "OPTIONS" and route.path not in open_to_all
    }
    assert len(routes) >= 6
    async with browser(rig) as client:
        for method, path in routes:
            url = path.replace("{run_id:str}", "run_0").replace("{number:int}", "1")
            url = url.replace("{key_id:str}", "key_0").replace("{tenant_id:str}", "ten_0")
            answer = await client.request(method, url)
            assert answer.status_code == 303, path
            assert answer.headers["location"].startswith(SIGN_IN)


async def test_runs_are_found(rig: Rig) -> None:
    """By a part of their id, base model or tags, and by status; text of a search is text."""
    run = await rig.tenant.new_run()
    async with signed_in(rig, rig.tenant) as window:
        client = window.client
        for query, found in (
            (f"search={run.run_id[-6:].upper()}", True),
            ("search=%25", False),
            ("search=<script>alert(1)</script>", False),
            ("status=open", True),
            ("status=lost", False),
            ("status=nonsense", True),
        ):
            page = (await client.get(f"/admin/runs?{query}")).text
            assert (run.run_id in page) == found, query
            assert "<script>alert" not in page


async def test_series_are_columns(rig: Rig) -> None:
    """What a client logs at one step is one row; a metric may be missing there, and may be called `step`."""
    run = await rig.tenant.new_run()
    for step, metrics in (
        (1, {"reward": 0.5}),
        (1, {"length": 3.0}),
        (2, {"reward": 0.75, "step": 7.0}),
    ):
        logged = wire.LogMetrics(metrics=metrics, step=step)
        assert (await rig.tenant.post(f"/runs/{run.run_id}/metrics", logged)).status_code == 204
    async with signed_in(rig, rig.tenant) as window:
        client = window.client
        series = (await client.get(f"/admin/runs/{run.run_id}/series")).json()
        columns = {"reward": [0.5, 0.75], "length": [3.0, None], "step": [None, 7.0]}
        assert series == {"step": [1, 2], "metrics": columns}
        later = (await client.get(f"/admin/runs/{run.run_id}/series?after=1")).json()
        assert later == {"step": [2], "metrics": {"reward": [0.75], "step": [7.0]}}
        assert "0.75" in (await client.get("/admin/runs")).text


async def test_a_page_follows_what_happens_until_its_key_ends(rig: Rig) -> None:
    """The stream sends a part when it has changed and not before, and ends when the key is revoked."""
    run = await rig.tenant.new_run()
    events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def listen(client: httpx.AsyncClient) -> None:
        async with client.stream("GET", f"/admin/runs/{run.run_id}/live") as answer:
            event = ""
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data:"):
                    events.put_nowait((event, line[5:].strip()))

    async with signed_in(rig, rig.tenant) as window, asyncio.timeout(20):
        client = window.client
        listening = asyncio.create_task(listen(client))
        event, data = await events.get()
        assert event == "part"
        part = msgspec.json.decode(data, type=dict[str, str])
        assert part["id"] == "run"
        assert "0.875" not in part["html"]
        logged = wire.LogMetrics(metrics={"reward": 0.875}, step=1)
        await rig.tenant.post(f"/runs/{run.run_id}/metrics", logged)
        while "0.875" not in data:
            _, data = await events.get()
        revoked = await rig.admin.http.delete(f"/river/v1/keys/{rig.tenant.key_id}")
        assert revoked.status_code == 204
        while event != "signed_out":
            event, _ = await events.get()
        await listening
