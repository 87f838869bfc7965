"""Checkpoints on the dashboard: seen by their tenant and admins, promoted, rolled back, downloaded and deleted."""

from __future__ import annotations

import re

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
        for route in ("checkpoint/promote", "checkpoint/delete", "aliases/roll-back"):
            assert (await window.client.post(f"/admin/{route}", data=form)).status_code == 403
    assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] != []
