"""Checkpoints for others: shown to all, copied with their files shared, and opened by signed URLs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from support.gateway import Rig, error_of, eventually, running_rig
from support.stand_ins import BASE

from river_billing.storage import charge_storage
from river_client import wire
from river_gateway.checkpoints.signed_urls import UrlSigner
from river_trainer.store import FileSets

WEIGHTS = bytes(range(100))
NAME = "adapter_model.safetensors"


def folders(rig: Rig) -> list[str]:
    """The sets of files in the rig's store."""
    return sorted(FileSets(rig.store.as_uri()).folders("checkpoints"))


async def publish(rig: Rig, path: str) -> httpx.Response:
    return await rig.tenant.http.post("/river/v1/checkpoints/public", params={"path": path})


async def unpublish(rig: Rig, path: str) -> httpx.Response:
    return await rig.tenant.http.request(
        "DELETE", "/river/v1/checkpoints/public", params={"path": path}
    )


async def uses(rig: Rig, path: str) -> list[int]:
    """What a stranger gets who samples from a path, chats with it, starts from it and copies it."""
    who = rig.stranger
    session = (await who.post("/sessions", wire.CreateSession())).json()["session_id"]
    start = wire.CreateRun(session_id=session, base_model=BASE, checkpoint=path, optimizer=False)
    chat = {"model": path, "messages": [{"role": "user", "content": "x"}]}
    answers = [
        await who.post("/sample", wire.SampleRequest(model=path, prompts=["x"], max_tokens=2)),
        await who.http.post("/v1/chat/completions", json=chat),
        await who.post("/runs", start),
        await who.post("/checkpoints/copy", wire.CopyCheckpoint(path=path)),
    ]
    return [answer.status_code for answer in answers]


# ---- Shown to all ----------------------------------------------------------------------------------------------------


async def test_a_published_checkpoint_is_for_everybody_to_use(rig: Rig) -> None:
    """By its path, from the moment it is published until it is not; what was copied meanwhile stays."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(
        run.run_id, 1, "shared", mode="inference", user_metadata={"note": "mine"}
    )
    assert await uses(rig, saved.path) == [404] * 4
    assert (await publish(rig, saved.path)).status_code == 204
    (listed,) = (await rig.tenant.get("/checkpoints")).json()["checkpoints"]
    assert listed["public"] is True
    assert await uses(rig, saved.path) == [200, 200, 201, 201]
    assert (await unpublish(rig, saved.path)).status_code == 204
    assert await uses(rig, saved.path) == [404] * 4
    (copy,) = (await rig.stranger.get("/checkpoints")).json()["checkpoints"]
    assert copy["name"] == "shared"
    assert copy.get("user_metadata", {}) == {}  # The owner's notes are the owner's.
    sampled = wire.SampleRequest(model=copy["path"], prompts=["x"], max_tokens=2)
    assert (await rig.stranger.post("/sample", sampled)).status_code == 200


async def test_nothing_else_of_a_published_checkpoint_is_for_others(rig: Rig) -> None:
    """Nobody else sees it in a list, has its files or URLs, points a name at it, changes it or ends it."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "shared")
    private = await rig.tenant.save(run.run_id, 2, "private")
    await publish(rig, saved.path)
    who, path = rig.stranger, {"path": saved.path}
    assert (await who.get("/checkpoints")).json()["checkpoints"] == []
    answers = [
        await who.get("/checkpoints", **path),
        await who.get("/checkpoints/files", **path),
        await who.get("/checkpoints/file", **path, name=NAME),
        await who.get("/checkpoints/urls", **path),
        await who.http.put("/river/v1/aliases/mine", json={"target": saved.path}),
        await who.http.delete("/river/v1/checkpoints", params=path),
        await who.http.delete("/river/v1/checkpoints/public", params=path),
        await who.http.patch("/river/v1/checkpoints", params=path, json={"ttl_s": 60}),
        await who.get(f"/runs/{run.run_id}"),
        await who.post("/sample", wire.SampleRequest(model=f"river://{run.run_id}", prompts=["x"])),
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert await uses(rig, private.path) == [404] * 4


async def test_a_stranger_s_use_is_billed_to_the_stranger_alone(rig: Rig) -> None:
    """And does not name the owner's run, whose usage the owner can see."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "shared")
    await publish(rig, saved.path)
    request = wire.SampleRequest(model=saved.path, prompts=["x"], max_tokens=2)
    assert (await rig.stranger.post("/sample", request)).status_code == 200
    (event,) = await rig.usage(1)
    assert (event.tenant_id, event.run_id) == (rig.stranger.tenant_id, None)


async def test_publishing_twice_is_a_conflict(rig: Rig) -> None:
    """So is unpublishing what is not published; each says which it was."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    refused = await unpublish(rig, saved.path)
    assert (refused.status_code, error_of(refused).message) == (409, "path: 'x' is not published")
    assert (await publish(rig, saved.path)).status_code == 204
    refused = await publish(rig, saved.path)
    assert refused.status_code == 409
    assert error_of(refused).message == "path: 'x' is published already"


# ---- Copies ----------------------------------------------------------------------------------------------------------


async def test_a_copy_outlives_what_it_was_copied_from(rig: Rig) -> None:
    """They share their files, which go with the last of both, whichever that is."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x", user_metadata={"a": "b"})
    answer = await rig.tenant.post("/checkpoints/copy", wire.CopyCheckpoint(path=saved.path))
    assert answer.status_code == 201
    copy = answer.json()
    assert copy["path"] != saved.path
    assert (copy["name"], copy["mode"], copy["user_metadata"]) == ("x", "training", {"a": "b"})
    assert copy["policy_version"].rpartition("@")[2] == saved.policy_version.rpartition("@")[2]
    await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": saved.path})
    file = await rig.tenant.get("/checkpoints/file", path=copy["path"], name=NAME)
    assert file.content == WEIGHTS
    time.sleep(0.5)  # noqa: ASYNC251 - sweeps that could do harm come meanwhile, once this is over
    await eventually(lambda: folders(rig) == [saved.checkpoint_id])
    await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": copy["path"]})
    await eventually(lambda: folders(rig) == [])


async def test_a_copy_cannot_be_trained_on_but_started_from(rig: Rig) -> None:
    """It hangs on a run that no list of runs shows."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    copied = await rig.tenant.post("/checkpoints/copy", wire.CopyCheckpoint(path=saved.path))
    copy = copied.json()
    refused = await rig.tenant.submit(copy["run_id"], 1, wire.SaveWeights(name="y"))
    assert refused.status_code == 409
    started = await rig.tenant.new_run(checkpoint=copy["path"])
    assert started.lora == run.lora
    listed = {row["run_id"] for row in (await rig.tenant.get("/runs")).json()["runs"]}
    assert listed == {run.run_id, started.run_id}


async def test_a_copy_is_made_once(rig: Rig) -> None:
    """The same request again is the same copy; another under its key is a conflict."""
    run = await rig.tenant.new_run()
    first, other = [await rig.tenant.save(run.run_id, seq, f"c{seq}") for seq in (1, 2)]
    headers = {"idempotency-key": "once"}
    made = [
        await rig.tenant.post("/checkpoints/copy", wire.CopyCheckpoint(path=path), headers=headers)
        for path in (first.path, first.path, other.path)
    ]
    assert [answer.status_code for answer in made] == [201, 201, 409]
    assert made[0].json()["checkpoint_id"] == made[1].json()["checkpoint_id"]


async def test_the_copier_pays_for_the_copy(rig: Rig) -> None:
    """Storage of both is charged, each to its own tenant, by the size of the whole."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    await publish(rig, saved.path)
    copied = await rig.stranger.post("/checkpoints/copy", wire.CopyCheckpoint(path=saved.path))
    assert copied.status_code == 201
    async with rig.services.pool.acquire() as connection:
        await connection.execute(
            "update checkpoint set created_at = now() - interval '3 days', size_bytes = 10^9"
        )
        await connection.execute("update recorder_progress set recorded_until = now()")
        assert await charge_storage(connection) > 0
        rows = await connection.fetch(
            "select tenant_id, sum(quantity)::bigint as used from usage_event where kind = 'storage' group by 1"
        )
    used = {row["tenant_id"]: row["used"] for row in rows}
    assert used.keys() == {rig.tenant.tenant_id, rig.stranger.tenant_id}
    assert used[rig.tenant.tenant_id] == used[rig.stranger.tenant_id] > 24_000_000


# ---- Signed URLs -----------------------------------------------------------------------------------------------------


async def urls_of(rig: Rig, **changes: Any) -> dict[str, str]:
    """The URLs of a new external checkpoint."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "out", mode="external", **changes)
    return (await rig.tenant.get("/checkpoints/urls", path=saved.path)).json()["urls"]


async def test_a_signed_url_opens_its_file_without_a_key(rig: Rig) -> None:
    """The whole of it, or the part that is asked for."""
    urls = await urls_of(rig)
    assert list(urls) == ["adapter_config.json", NAME]
    async with httpx.AsyncClient() as nobody:
        whole = await nobody.get(urls[NAME])
        part = await nobody.get(urls[NAME], headers={"range": "bytes=90-"})
        beyond = await nobody.get(urls[NAME], headers={"range": "bytes=200-"})
    assert (whole.status_code, whole.content) == (200, WEIGHTS)
    assert (part.status_code, part.content) == (206, WEIGHTS[90:])
    assert part.headers["content-range"] == "bytes 90-99/100"
    assert beyond.status_code == 422


async def test_a_changed_url_opens_nothing(rig: Rig) -> None:
    """Neither another file, checkpoint or time, nor another signature; its query says nothing of the store."""
    urls = await urls_of(rig)
    config, weights = (urlsplit(urls[name]) for name in ("adapter_config.json", NAME))
    async with httpx.AsyncClient(base_url=rig.url) as nobody:
        for url in (
            f"{weights.path}?{config.query}",
            f"{weights.path}?{weights.query.replace('expires=', 'expires=9')}",
            f"{weights.path}?{weights.query[:-1]}{'0' if weights.query[-1] != '0' else '1'}",
            f"{weights.path.replace('ckpt_', 'ckpt_0')}?{weights.query}",
            f"{weights.path}?expires=9999999999&signature=é",
        ):
            refused = await nobody.get(url)
            assert refused.status_code == 404, url
            assert "was not signed here" in error_of(refused).message
        assert (await nobody.get(weights.path)).status_code in (400, 422)


async def test_a_url_ends_with_its_time_or_its_checkpoint(rig: Rig) -> None:
    """One that is over says so; one of a deleted checkpoint opens nothing."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "out", mode="external", ttl_s=120)
    given = (await rig.tenant.get("/checkpoints/urls", path=saved.path)).json()
    assert saved.expires_at is not None
    assert given["expires_at"][:19] == saved.expires_at[:19]
    past = await rig.services.url_signer.query(saved.checkpoint_id, NAME, int(time.time()) - 1)
    over = await rig.stranger.http.get(f"/river/v1{past}")
    assert (over.status_code, error_of(over).message) == (
        403,
        "expires: the time of this URL is over",
    )
    await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": saved.path})
    assert (await rig.stranger.http.get(given["urls"][NAME])).status_code == 404


async def test_all_gateways_sign_alike(rig: Rig, postgres_url: str) -> None:
    """With the one secret that is kept, or with the one that is configured; two differ."""
    path = await rig.services.url_signer.query("ckpt_1", NAME, 9)
    pool = await asyncpg.create_pool(postgres_url, min_size=0)
    try:
        other: Any = UrlSigner(pool, None)  # pyright: ignore[reportArgumentType]
        configured: Any = UrlSigner(pool, "s" * 16)  # pyright: ignore[reportArgumentType]
        assert await other.query("ckpt_1", NAME, 9) == path
        assert await configured.query("ckpt_1", NAME, 9) != path
    finally:
        await pool.close()


async def test_urls_begin_as_the_gateway_is_called(
    postgres_url: str, nats_url: str, tmp_path: Path
) -> None:
    """By its public URL where one is set, whatever name the request came under."""
    options: dict[str, Any] = {"public_url": "https://river.example/base/"}
    async with running_rig(postgres_url, nats_url, tmp_path, **options) as rig:
        urls = await urls_of(rig)
    assert urls[NAME].startswith("https://river.example/base/river/v1/signed/ckpt_")


@pytest.mark.parametrize("ttl_s", [0, 10**10], ids=["zero", "ages"])
async def test_a_copy_s_time_to_live_is_checked(rig: Rig, ttl_s: int) -> None:
    """As that of a save is, and nothing is left behind."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    refused = await rig.tenant.post(
        "/checkpoints/copy", wire.CopyCheckpoint(path=saved.path, ttl_s=ttl_s)
    )
    assert refused.status_code == 422
    assert error_of(refused).message.startswith("ttl_s: ")
    assert len((await rig.tenant.get("/checkpoints")).json()["checkpoints"]) == 1
