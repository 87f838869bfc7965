"""What users write on their sessions, runs and checkpoints, and saves that replace nothing or are for use elsewhere."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pyrage
import pytest
from support.gateway import Rig, Tenant, error_of
from support.stand_ins import BASE

from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.errors import NotFoundError
from river_gateway.training import session_list
from river_gateway.training.session_list import After, Wanted

AGE: Any = cast("Any", pyrage)


async def new_session(tenant: Tenant) -> str:
    """A session's id."""
    return (await tenant.post("/sessions", wire.CreateSession())).json()["session_id"]


def paths(answer: httpx.Response) -> list[str]:
    """The paths of the checkpoints in an answer."""
    return [row["path"] for row in answer.json()["checkpoints"]]


# ---- Metadata --------------------------------------------------------------------------------------------------------


async def test_what_users_write_on_runs_and_checkpoints_comes_back(rig: Rig) -> None:
    """Metadata of a run and of a checkpoint are in every answer about them, results and lists alike."""
    run = await rig.tenant.new_run(user_metadata={"renderer_name": "qwen3"})
    assert run.user_metadata == {"renderer_name": "qwen3"}
    saved = await rig.tenant.save(run.run_id, 1, "x", user_metadata={"step": "one"})
    assert saved.user_metadata == {"step": "one"}
    (listed,) = (await rig.tenant.get("/checkpoints")).json()["checkpoints"]
    assert listed["user_metadata"] == {"step": "one"}
    again = (await rig.tenant.get(f"/runs/{run.run_id}")).json()
    assert again["user_metadata"] == {"renderer_name": "qwen3"}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({str(number): "" for number in range(65)}, "user_metadata: 65, at most 64"),
        ({"a": "x" * 513}, "user_metadata.a: at most 512 characters"),
    ],
    ids=["many", "long"],
)
async def test_too_much_metadata_is_refused(rig: Rig, metadata: dict[str, str], said: str) -> None:
    """Of a run and of a checkpoint, naming what is too much."""
    run = await rig.tenant.new_run()
    asked = wire.CreateRun(session_id=run.session_id, base_model=BASE, user_metadata=metadata)
    for answer in (
        await rig.tenant.post("/runs", asked),
        await rig.tenant.submit(run.run_id, 1, wire.SaveWeights(name="x", user_metadata=metadata)),
    ):
        assert (answer.status_code, error_of(answer).message) == (422, said)


async def test_the_number_of_a_run_in_its_session(rig: Rig) -> None:
    """It is kept for the run, and finds it again."""
    run = await rig.tenant.new_run()
    pool, tenant_id = rig.services.pool, rig.tenant.tenant_id
    for _ in range(2):
        await session_list.describe_run(
            pool, run_id=run.run_id, tenant_id=tenant_id, model_seq_id=3
        )
    found = await catalog.find_run(pool, run_id=run.run_id, tenant_id=tenant_id)
    assert found.model_seq_id == 3
    by_number = [
        await session_list.find_run_of_session(pool, session_id=run.session_id, model_seq_id=number)
        for number in (3, 4)
    ]
    assert by_number == [run.run_id, None]
    await session_list.describe_run(
        pool, run_id=run.run_id, tenant_id=rig.stranger.tenant_id, model_seq_id=9
    )
    found = await catalog.find_run(pool, run_id=run.run_id, tenant_id=tenant_id)
    assert found.model_seq_id == 3


# ---- Saves -----------------------------------------------------------------------------------------------------------


async def test_a_save_without_overwrite_replaces_nothing(rig: Rig) -> None:
    """A name that is taken is a conflict; the same save sent again is not, nor is the name in another mode."""
    run = await rig.tenant.new_run()
    first = await rig.tenant.save(run.run_id, 1, "x", overwrite=False)
    again = await rig.tenant.save(run.run_id, 1, "x", overwrite=False)
    assert again.checkpoint_id == first.checkpoint_id
    refused = await rig.tenant.submit(run.run_id, 2, wire.SaveWeights(name="x", overwrite=False))
    assert refused.status_code == 409
    assert "there is a checkpoint 'x' already" in error_of(refused).message
    await rig.tenant.save(run.run_id, 2, "x", mode="inference", overwrite=False)
    replaced = await rig.tenant.save(run.run_id, 3, "x")
    assert replaced.checkpoint_id != first.checkpoint_id


async def test_external_weights_are_encrypted_for_who_asks(rig: Rig) -> None:
    """Each file can be read with the recipient's key only, and is the one that was saved."""
    key = AGE.x25519.Identity.generate()
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(
        run.run_id, 1, "out", mode="external", age_recipients=[str(key.to_public())]
    )
    assert saved.path == f"river://{run.run_id}/external_weights/out"
    files = (await rig.tenant.get("/checkpoints/files", path=saved.path)).json()["files"]
    assert [file["name"] for file in files] == [
        "adapter_config.json.age",
        "adapter_model.safetensors.age",
    ]
    name = "adapter_model.safetensors.age"
    stored = (await rig.tenant.get("/checkpoints/file", path=saved.path, name=name)).content
    assert AGE.decrypt(stored, [key]) == bytes(range(100))
    with pytest.raises(AGE.DecryptError):
        AGE.decrypt(stored, [AGE.x25519.Identity.generate()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"mode": "external", "age_recipients": ["ssh-ed25519 AAAA"]},
            "age_recipients[0]: 'ssh-ed25519 AAAA' is no X25519 recipient of age",
        ),
        (
            {"mode": "external", "age_recipients": ["age1"] * 17},
            "age_recipients: 17, at most 16",
        ),
        (
            {"mode": "inference", "age_recipients": ["age1"]},
            "age_recipients: a checkpoint for inference cannot be encrypted",
        ),
    ],
    ids=["none", "many", "mode"],
)
async def test_wrong_recipients_are_refused(rig: Rig, changes: dict[str, Any], said: str) -> None:
    """By field, index and reason, before anything is saved."""
    run = await rig.tenant.new_run()
    refused = await rig.tenant.submit(run.run_id, 1, wire.SaveWeights(name="x", **changes))
    assert refused.status_code == 422
    assert error_of(refused).message.startswith(said)


async def test_external_weights_are_not_for_use_here(rig: Rig) -> None:
    """They are neither loaded, started from nor sampled, and each refusal says so; nor is their version taken there."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "out", mode="external")
    session = await new_session(rig.tenant)
    start = wire.CreateRun(session_id=session, base_model=BASE, checkpoint=saved.path)
    for answer in (
        await rig.tenant.submit(run.run_id, 2, wire.LoadWeights(path=saved.path)),
        await rig.tenant.post("/runs", start),
        await rig.tenant.post("/sample", wire.SampleRequest(model=saved.path, prompts=["x"])),
    ):
        assert answer.status_code == 422, answer.text
        assert "is for use elsewhere" in error_of(answer).message
    found = await catalog.find_checkpoint_of_step(
        rig.services.pool, run_id=run.run_id, step=0, tenant_id=rig.tenant.tenant_id
    )
    assert found is None


# ---- Sessions --------------------------------------------------------------------------------------------------------


async def test_sessions_are_found_by_what_they_are(rig: Rig) -> None:
    """By id, name, metadata, project and how they ended, each alone; another tenant's never."""
    pool, tenant_id = rig.services.pool, rig.tenant.tenant_id
    first, second = [await new_session(rig.tenant) for _ in range(2)]
    stranger = await new_session(rig.stranger)
    await session_list.describe_session(
        pool,
        session_id=first,
        tenant_id=tenant_id,
        display_name="Sweep 12",
        user_metadata={"lr": "1e-4", "seed": "7"},
        project_id="archive",
    )
    await session_list.finish_session(
        pool, session_id=second, tenant_id=tenant_id, reason="errored", detail="out of data"
    )

    async def found(who: str = tenant_id, **wanted: Any) -> list[str]:
        rows = await session_list.search_sessions(pool, who, Wanted(**wanted), limit=10)
        return [row.session_id for row in rows]

    assert await found() == [second, first]
    assert await found(session_id=first) == [first]
    assert await found(display_name="sweep") == [first]
    assert await found(display_name="%") == []
    assert await found(user_metadata={"seed": "7"}) == [first]
    assert await found(user_metadata={"seed": "8"}) == []
    assert await found(project_ids=["archive", "x"]) == [first]
    assert await found(key_ids=[rig.tenant.key_id]) == [second, first]
    assert await found(key_ids=[rig.stranger.key_id]) == []
    assert await found(statuses=["errored"]) == [second]
    assert await found(statuses=["active"]) == [first]
    assert await found(rig.stranger.tenant_id) == [stranger]
    assert await found(rig.stranger.tenant_id, session_id=first) == []


async def test_pages_of_sessions_go_on_where_they_ended(rig: Rig) -> None:
    """By the last one of a page, and by number; new sessions meanwhile change nothing of what follows."""
    pool, tenant_id = rig.services.pool, rig.tenant.tenant_id
    made = [await new_session(rig.tenant) for _ in range(5)]
    first = await session_list.search_sessions(pool, tenant_id, Wanted(), limit=2)
    await new_session(rig.tenant)
    after = After(first[-1].created_at, first[-1].session_id)
    rest = await session_list.search_sessions(pool, tenant_id, Wanted(), limit=9, after=after)
    assert [row.session_id for row in [*first, *rest]] == made[::-1]
    by_number = await session_list.search_sessions(pool, tenant_id, Wanted(), limit=2, offset=4)
    assert [row.session_id for row in by_number] == made[1::-1]


async def test_a_session_counts_what_its_runs_have_stored(rig: Rig) -> None:
    """Live checkpoints only, and their bytes."""
    run = await rig.tenant.new_run()
    kept = await rig.tenant.save(run.run_id, 1, "kept")
    gone = await rig.tenant.save(run.run_id, 2, "gone")
    await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": gone.path})
    found = await session_list.find_session(
        rig.services.pool, session_id=run.session_id, tenant_id=rig.tenant.tenant_id
    )
    assert (found.checkpoints, found.size_bytes) == (1, kept.size_bytes)
    assert found.tags == {"who": "test"}


async def test_how_a_session_ended_is_told_once(rig: Rig) -> None:
    """The first reason stays; one that nobody ended and nobody hears of is silent; a stranger's does not exist."""
    pool, tenant_id = rig.services.pool, rig.tenant.tenant_id
    ended, silent = [await new_session(rig.tenant) for _ in range(2)]
    for reason in ("interrupted", "success"):
        await session_list.finish_session(
            pool, session_id=ended, tenant_id=tenant_id, reason=reason, detail=None
        )
    await pool.execute(
        "update session set heartbeat_at = now() - interval '1 hour' where session_id = $1", silent
    )
    found = await session_list.search_sessions(pool, tenant_id, Wanted(), limit=5)
    assert {row.session_id: row.status for row in found} == {
        ended: "interrupted",
        silent: "silent",
    }
    stranger: dict[str, Any] = {"session_id": ended, "tenant_id": rig.stranger.tenant_id}
    attempts = [
        session_list.find_session(pool, **stranger),
        session_list.describe_session(pool, **stranger, display_name="x"),
        session_list.finish_session(pool, **stranger, reason="success", detail=None),
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError, match="there is no session"):
            await attempt
    assert await session_list.runs_of_session(pool, **stranger) == []
