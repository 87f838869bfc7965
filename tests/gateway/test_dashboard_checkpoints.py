"""Checkpoints on the dashboard: seen by their tenant and admins, promoted, rolled back, downloaded and deleted."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime

import pytest
from support.dashboard import signed_in
from support.gateway import Rig, Tenant
from support.stand_ins import BASE

from river_client import wire


async def saved(tenant: Tenant, name: str = "good") -> wire.Checkpoint:
    """A checkpoint of a new run."""
    run = await tenant.new_run()
    return await tenant.save(run.run_id, 1, name, mode="inference")


async def target_of(tenant: Tenant, alias: str) -> str:
    """What an alias points at."""
    return (await tenant.get(f"/aliases/{alias}")).json()["target"]


async def test_a_checkpoint_is_promoted_and_rolled_back(rig: Rig) -> None:
    """One form points an alias at it, one goes back; the same click again goes back no further."""
    checkpoint = await saved(rig.tenant)
    await rig.tenant.http.put("/river/v1/aliases/tutor", json={"target": BASE})
    async with signed_in(rig, rig.tenant) as window:
        path = checkpoint.path
        done = await window.send("/checkpoint/promote", path=path, alias="tutor")
        assert done.status_code == 303
        assert await target_of(rig.tenant, "tutor") == path
        assert "Answers for" in (await window.client.get(done.headers["location"])).text
        for _ in range(2):
            answer = await window.send("/aliases/roll-back", alias="tutor", version="2")
            assert answer.status_code == 303
            assert await target_of(rig.tenant, "tutor") == BASE
        for alias in (BASE, "", "a/b"):
            refused = await window.send("/checkpoint/promote", path=path, alias=alias)
            assert refused.status_code in (409, 422), alias
            assert 'role="alert"' in refused.text
        refused = await window.send("/aliases/roll-back", alias="tutor", version="x")
        assert refused.status_code == 422


async def test_deleting_takes_its_name(rig: Rig) -> None:
    """Without the typed name nothing happens; with it the checkpoint is gone."""
    path = (await saved(rig.tenant)).path
    async with signed_in(rig, rig.tenant) as window:
        for typed in ("", "Good", "goo"):
            refused = await window.send("/checkpoint/delete", path=path, confirmation=typed)
            assert refused.status_code == 422
        assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] != []
        done = await window.send("/checkpoint/delete", path=path, confirmation="good")
        assert done.status_code == 303
        assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] == []
        assert (await window.client.get(f"/admin/checkpoint?path={path}")).status_code == 404


async def test_how_long_it_is_kept(rig: Rig) -> None:
    """For days from now on or for ever, by the form as by the API; what answers under its path learns of it at once."""
    path = (await saved(rig.tenant)).path

    async def expires_in_s() -> float | None:
        (found,) = (await rig.tenant.get("/checkpoints", path=path)).json()["checkpoints"]
        if found.get("expires_at") is None:
            return None
        return (datetime.fromisoformat(found["expires_at"]) - datetime.now(UTC)).total_seconds()

    async with signed_in(rig, rig.tenant) as window:
        assert "never" in await window.page(f"/checkpoint?path={path}")
        for days in ("30", "0.5"):
            done = await window.send("/checkpoint/ttl", path=path, keep="days", days=days)
            assert done.status_code == 303
            assert await expires_in_s() == pytest.approx(float(days) * 86_400, abs=30)
        page = await window.page(f"/checkpoint?path={path}")
        assert "in 11 h" in page
        done = await window.send("/checkpoint/ttl", path=path, keep="forever", days="")
        assert await expires_in_s() is None
        for days in ("", "0", "-1", "x", "nan", "inf", "99999"):
            refused = await window.send("/checkpoint/ttl", path=path, keep="days", days=days)
            assert refused.status_code == 422, days
        assert await expires_in_s() is None
    answered = await rig.tenant.http.patch(f"/river/v1/checkpoints?path={path}", json={"ttl_s": 60})
    assert answered.json()["expires_at"] is not None
    for body, status in (({"ttl_s": 0}, 422), ({}, 422), ({"ttl_s": 1}, 200)):
        answered = await rig.tenant.http.patch(f"/river/v1/checkpoints?path={path}", json=body)
        assert answered.status_code == status, body
    asked = {"model": path, "messages": [{"role": "user", "content": "x"}]}
    assert (await rig.tenant.http.post("/v1/chat/completions", json=asked)).status_code == 200
    await asyncio.sleep(1.1)
    assert (await rig.tenant.http.post("/v1/chat/completions", json=asked)).status_code == 404
    # What has expired does not come back.
    answered = await rig.tenant.http.patch(f"/river/v1/checkpoints?path={path}", json={"ttl_s": 9})
    assert answered.status_code == 404


async def test_files_are_downloaded_in_parts(rig: Rig) -> None:
    """A file comes as an attachment; a `Range` gets the rest of it."""
    path = (await saved(rig.tenant)).path
    async with signed_in(rig, rig.tenant) as window:
        page = await window.page(f"/checkpoint?path={path}")
        links = re.findall(r'href="(/admin/checkpoint/file\?[^"]+)"', page)
        assert links
        url = links[0].replace("&amp;", "&")
        whole = await window.client.get(url)
        assert whole.headers["content-disposition"].startswith("attachment")
        rest = await window.client.get(url, headers={"range": "bytes=1-"})
        assert rest.status_code == 206
        assert whole.content[1:] == rest.content
        missing = await window.client.get(f"/admin/checkpoint/file?path={path}&name=../x")
        assert missing.status_code == 404


async def test_a_stranger_can_do_nothing(rig: Rig) -> None:
    """Another's checkpoint is answered as one that nobody has, whatever is asked; an admin may do it all."""
    checkpoint = await saved(rig.tenant)
    await rig.tenant.http.put("/river/v1/aliases/tutor", json={"target": checkpoint.path})
    async with signed_in(rig, rig.stranger) as window:
        for path in (checkpoint.path, "river://run_0/weights/x", "nonsense", ""):
            for url in (f"?path={path}", f"/live?path={path}", f"/file?path={path}&name=x"):
                assert (await window.client.get(f"/admin/checkpoint{url}")).status_code == 404, url
            promoted = await window.send("/checkpoint/promote", path=path, alias="a")
            assert promoted.status_code == 404
            deleted = await window.send("/checkpoint/delete", path=path, confirmation="good")
            assert deleted.status_code == 404
            kept = await window.send("/checkpoint/ttl", path=path, keep="forever")
            assert kept.status_code == 404
        # The tenant of a form is an admin's to name.
        whose = rig.tenant.tenant_id
        answer = await window.send("/aliases/roll-back", alias="tutor", version="1", tenant=whose)
        assert answer.status_code == 404
        assert checkpoint.path not in await window.page("/checkpoints")
    async with signed_in(rig, rig.admin) as window:
        assert checkpoint.run_id in await window.page("/checkpoints")
        done = await window.send("/checkpoint/promote", path=checkpoint.path, alias="tutor")
        assert done.status_code == 303


async def test_forms_need_their_token(rig: Rig) -> None:
    """Each form that changes something is refused without it."""
    path = (await saved(rig.tenant)).path
    async with signed_in(rig, rig.tenant) as window:
        form = {"path": path, "alias": "a", "version": "1", "confirmation": "good"}
        form["keep"] = "forever"
        for route in (
            "checkpoint/promote",
            "checkpoint/ttl",
            "checkpoint/delete",
            "aliases/roll-back",
        ):
            assert (await window.client.post(f"/admin/{route}", data=form)).status_code == 403
    assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] != []
