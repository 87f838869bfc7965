"""The unmodified Tinker SDK and its program: all that they can ask about runs, checkpoints, sessions and an account."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from support.billing import make_event
from support.client_environment import run_client
from support.gateway import Rig, Tenant
from support.stand_ins import BASE
from support.tinker import TinkerUser

from river_billing.recorder import record_events

PROGRAM = Path(__file__).parents[3] / "clients" / "programs" / "tinker_rest.py"


async def client(
    rig: Rig, who: Tenant, program: Path | str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """A program of the SDK's environment, run as a tenant."""
    key = "tml-" + who.secret.removeprefix("rv-")
    environment = {"TINKER_BASE_URL": rig.url, "TINKER_API_KEY": key}
    return await asyncio.to_thread(run_client, program, *arguments, environment=environment)


async def saved(user: TinkerUser, model: str, seq: int, name: str) -> str:
    """The path of a training checkpoint."""
    body = {"model_id": model, "path": name, "seq_id": seq}
    accepted = await user.accepted("/save_weights", body)
    return (await user.result(accepted["request_id"])).json()["path"]


async def record_use(rig: Rig, run_id: str | None) -> None:
    """An hour's use of a tenant, partly of a run."""
    used: dict[str, Any] = {
        "tenant_id": rig.tenant.tenant_id,
        "key_id": rig.tenant.key_id,
        "base_model": BASE,
    }
    moment = time.time() - 60
    async with rig.services.pool.acquire() as connection:
        await record_events(
            connection,
            [
                make_event(1, **used, occurred_at=moment, prompt=10, cached_prompt=3, completion=7),
                make_event(2, **used, occurred_at=moment, training=50, run_id=run_id),
            ],
        )


async def test_every_method_of_the_rest_and_admin_clients(rig: Rig) -> None:
    """Each parses what comes, as strictly as it does, and raises its own error, with our sentence, for bad input."""
    owner = TinkerUser(rig.stranger)
    model = await owner.new_model()
    published, private = [await saved(owner, model, seq, f"c{seq}") for seq in (1, 2)]
    route = published.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
    assert (await owner.post(f"/training_runs/{route}/publish")).status_code == 204
    await record_use(rig, None)
    ended = await client(rig, rig.tenant, PROGRAM, published, private)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    came = json.loads(ended.stdout.splitlines()[-1])
    _check_told(came["told"], came["run_id"])
    _check_account(came["told"])
    _check_refused(came["refused"], came["run_id"], private)


def _check_told(told: dict[str, Any], run_id: str) -> None:
    run = told["run"]
    assert (run["training_run_id"], run["base_model"], run["lora_rank"]) == (run_id, BASE, 4)
    assert run["user_metadata"] == {"renderer_name": "plain"}
    assert run["last_checkpoint"]["tinker_path"] == f"tinker://{run_id}/weights/state"
    assert run["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/sample"
    assert told["run_by_path"]
    assert told["runs"] == {"offset": 0, "limit": 1, "total_count": 1}
    assert (told["runs_of_project"], told["runs_of_no_project"]) == (1, 0)
    assert told["weights_info"]["base_model"] == BASE
    assert (told["weights_info"]["train_mlp"], told["published_info"]) == (True, 4)
    kinds = {one["checkpoint_type"]: one for one in told["checkpoints"]}
    assert kinds.keys() == {"training", "sampler", "external"}
    assert kinds["training"]["user_metadata"] == {"step": "0"}
    assert kinds["training"]["size_bytes"] == 102
    assert told["page"] == [2, {"offset": 1, "limit": 2, "total_count": 3}]
    assert list(told["urls"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert 3500 < told["urls_end_in_s"] <= 3600
    assert told["for_ever"] is True
    assert 3500 < told["for_an_hour"] <= 3600
    assert told["public"] == [False, True]
    assert (told["copied"], told["copy"], told["copied_own"], told["loaded"]) == (
        "c1",
        True,
        "state",
        True,
    )
    assert told["left"] == 2
    assert (told["session_runs"], told["session_samplers"], told["sampler"]) == (True, 1, True)
    assert told["session_metadata"] == {"experiment": "seven"}
    assert told["sessions"]
    found = told["found"]
    assert (found["project_id"], found["status"]) == ("moved", {"type": "active"})
    assert found["checkpoints_count"] == 2
    assert found["checkpoint_storage_bytes"] == 204
    assert (told["found_by_metadata"], told["found_by_project"], told["found_by_other"]) == (
        1,
        1,
        0,
    )
    assert told["pages"]
    assert told["finished"]["reason"] == {"type": "interrupted"}


def _check_account(told: dict[str, Any]) -> None:
    kinds = {
        (event["event_info"]["type"], event["event_info"].get("cached")): event
        for event in told["usage"]
    }
    counts = {kind: event["event_info"]["token_count"] for kind, event in kinds.items()}
    assert counts == {
        ("sampling_prefill", False): 10,
        ("sampling_prefill", True): 3,
        ("sampling_sample", None): 7,
        ("training", None): 50,
    }
    assert all(event["base_model"] == BASE for event in told["usage"])
    assert told["usage_of_rest"] == 4
    (stored,) = [one for one in told["stored"]["data"] if one["project_id"] == "moved"]
    assert (stored["checkpoint_count"], stored["size_bytes"]) == (2, 204)
    assert told["stored_none"] == []
    assert {"checkpoints.publish", "checkpoints.copy", "checkpoints.delete"} <= set(told["audit"])
    assert told["audit_none"] == []


def _check_refused(refused: dict[str, list[str]], run_id: str, private: str) -> None:
    session = run_id.partition(":")[0]
    expected = {
        "run": ("NotFoundError", "there is no training run 'nobody'"),
        "run_number": ("NotFoundError", f"there is no training run '{session}:train:999'"),
        "run_by_path": ("NotFoundError", "there is no training run 'x'"),
        "weights_info": (
            "NotFoundError",
            f"there is no checkpoint 'tinker://{run_id}/weights/nothing'",
        ),
        "private": ("NotFoundError", f"there is no checkpoint {private!r}"),
        "runs": ("UnprocessableEntityError", "limit: 0, must be 1 at least"),
        "checkpoints": ("NotFoundError", "there is no training run 'nobody'"),
        "page": ("UnprocessableEntityError", "offset: -1, must be 0 to"),
        "urls": (
            "NotFoundError",
            f"there is no checkpoint 'tinker://{run_id}/external_weights/out'",
        ),
        "delete": ("NotFoundError", "there is no checkpoint"),
        "delete_foreign": ("NotFoundError", "there is no checkpoint"),
        "publish": ("UnprocessableEntityError", "path: 'sample' is published already"),
        "unpublish": ("UnprocessableEntityError", "path: 'state' is not published"),
        "ttl": ("UnprocessableEntityError", "ttl_seconds: 0, must be 1 to"),
        "copy": ("NotFoundError", f"there is no checkpoint {private!r}"),
        "copy_token": ("UnprocessableEntityError", "weights_access_token: copying with another"),
        "copy_project": (
            "UnprocessableEntityError",
            "destination_project_id: 'no project/' must be",
        ),
        "session": ("NotFoundError", "there is no session 'nobody'"),
        "sampler": ("NotFoundError", "there is no sampling session"),
        "project": ("UnprocessableEntityError", "project_id: ' ' must be"),
        "trace": ("", "exporting a trace is not offered"),
        "trace_of_nobody": ("NotFoundError", "there is no session 'nobody'"),
        "search": ("", "display_name"),
        "usage": ("", "ending_before"),
        "usage_minutes": ("", "starting_on"),
        "recipients": ("RequestFailedError", "age_encryption_recipients[0]: 'me' is no X25519"),
        "whoami": ("RuntimeError", "whoami requires JWT auth"),
    }
    assert refused.keys() == expected.keys()
    for name, (kind, sentence) in expected.items():
        came, said = refused[name]
        assert came == kind or (not kind and came != "nothing"), (name, came, said)
        assert sentence in said, (name, said)


async def test_the_cookbook_s_download(rig: Rig, tmp_path: Path) -> None:
    """It gets the files of a training checkpoint by way of an encrypted export, which it deletes afterwards."""
    user = TinkerUser(rig.tenant)
    path = await saved(user, await user.new_model(), 1, "state")
    program = PROGRAM.parent / "tinker_download.py"
    ended = await client(rig, rig.tenant, program, path, str(tmp_path / "weights"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    came = json.loads(ended.stdout.splitlines()[-1])
    assert came["files"] == {
        "adapter_config.json": b"{}".hex(),
        "adapter_model.safetensors": bytes(range(100)).hex(),
    }
    assert "there is no checkpoint" in came["refused"]
    listed = (await user.get("/checkpoints")).json()["checkpoints"]
    assert [one["tinker_path"] for one in listed] == [path]


# ---- The SDK's program -----------------------------------------------------------------------------------------------


async def test_the_commands_of_the_sdk_s_program(rig: Rig) -> None:
    """`tinker` lists, shows, publishes, keeps and deletes, and says of what is not there that it is not."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    path = await saved(user, model, 1, "kept")
    await record_use(rig, None)

    async def ask(*arguments: str, fails: bool = False) -> Any:
        ended = await client(rig, rig.tenant, "tinker", "-f", "json", *arguments)
        said = ended.stdout + ended.stderr
        assert (ended.returncode != 0) == fails, said
        return said if fails else json.loads(ended.stdout or "null")

    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, end = (hour + timedelta(hours=hours) for hours in (-1, 1))
    for arguments, wanted in (
        (("run", "list"), model),
        (("run", "info", model), model),
        (("checkpoint", "list"), path),
        (("checkpoint", "list", "--run-id", model), path),
        (("checkpoint", "info", path), path),
        (("model", "list"), BASE),
        (("billing", "usage", begin.isoformat(), end.isoformat()), "training"),
        (("billing", "checkpoint-storage"), "102"),
        (("auth", "whoami"), None),
    ):
        if wanted is None:
            assert "JWT" in await ask(*arguments, fails=True)
        else:
            assert wanted in json.dumps(await ask(*arguments)), arguments
    for arguments in (
        ("checkpoint", "publish", path),
        ("checkpoint", "unpublish", path),
        ("checkpoint", "set-ttl", path, "--ttl", "3600"),
        ("checkpoint", "set-ttl", path, "--remove"),
        ("checkpoint", "delete", path, "--yes"),
    ):
        await ask(*arguments)
    assert "there is no training run 'nobody'" in await ask("run", "info", "nobody", fails=True)
    assert "there is no checkpoint" in await ask("checkpoint", "publish", path, fails=True)
    session = model.partition(":")[0]
    assert "not offered" in await ask("session", "export-trace", session, "--url-only", fails=True)


async def test_a_key_looks_at_itself_and_ends_itself(rig: Rig) -> None:
    """As signing in and out of the program does: from then on it opens nothing, and the log has it."""
    user = TinkerUser(rig.tenant)
    told = (await user.get("/auth/apikey/me")).json()
    assert told["name"]
    assert isinstance(told["key_id"], int)
    assert set(told["details"]) == {"org_details", "user_details"}
    assert (await user.request("DELETE", "/auth/apikey/me")).status_code == 204
    assert (await user.get("/auth/apikey/me")).status_code == 401
    row = await rig.services.pool.fetchrow(
        "select action, through, subject from audit_log where action = 'keys.revoke'"
    )
    assert row is not None
    assert (row["through"], row["subject"]) == ("tinker", rig.tenant.key_id)
