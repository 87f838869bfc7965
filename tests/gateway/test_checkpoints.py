"""Checkpoints over real Postgres and stores: their files, their end, and what is made of adapters from elsewhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import msgspec
import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import save
from support.gateway import Rig, Tenant, error_of, eventually, running_rig
from support.s3 import S3, use_s3
from support.stand_ins import BASE

from river_client import wire
from river_gateway import limits
from river_gateway.checkpoints.peft_import import CONFIG_FILE, WEIGHTS_FILE, plan_import
from river_gateway.checkpoints.safetensors_file import read_header
from river_gateway.checkpoints.sweeper import sweep
from river_gateway.errors import InvalidFieldError
from river_trainer.protocol import CreateRun
from river_trainer.store import FileSets

ROUTE = "/river/v1/checkpoints"
WEIGHTS = bytes(range(100))
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def folders(rig: Rig) -> list[str]:
    """The sets of files in the rig's store."""
    return sorted(FileSets(rig.store.as_uri()).folders("checkpoints"))


async def checkpoint_rows(postgres_url: str) -> dict[str, bool]:
    """Of every checkpoint's name, whether its files were removed."""
    connection = await asyncpg.connect(postgres_url)
    try:
        rows = await connection.fetch("select name, files_removed_at from checkpoint")
    finally:
        await connection.close()
    return {row["name"]: row["files_removed_at"] is not None for row in rows}


# ---- The end of a checkpoint -----------------------------------------------------------------------------------------


async def test_an_expired_checkpoint_is_nowhere(rig: Rig, postgres_url: str) -> None:
    """From then on it is not listed, found, downloaded, sampled, chatted with or started from; then its files go."""
    run = await rig.tenant.new_run()
    lasting = await rig.tenant.save(run.run_id, 1, "lasting")
    brief = await rig.tenant.save(run.run_id, 2, "brief", ttl_s=1)
    assert brief.expires_at is not None
    assert {
        row["path"] for row in (await rig.tenant.get("/checkpoints")).json()["checkpoints"]
    } == {
        brief.path,
        lasting.path,
    }
    alias = await rig.tenant.http.put("/river/v1/aliases/prod", json={"target": brief.path})
    assert alias.status_code == 200
    await asyncio.sleep(1.1)

    listed = (await rig.tenant.get("/checkpoints")).json()["checkpoints"]
    assert [row["path"] for row in listed] == [lasting.path]
    name = "adapter_config.json"
    session = (await rig.tenant.post("/sessions", wire.CreateSession())).json()["session_id"]
    start = wire.CreateRun(session_id=session, base_model=BASE, checkpoint=brief.path)
    attempts = [
        await rig.tenant.get("/checkpoints", path=brief.path),
        await rig.tenant.get("/checkpoints/files", path=brief.path),
        await rig.tenant.get("/checkpoints/file", path=brief.path, name=name),
        await rig.tenant.submit(run.run_id, 3, wire.LoadWeights(path=brief.path)),
        await rig.tenant.post("/runs", start),
        await rig.tenant.http.put("/river/v1/aliases/new", json={"target": brief.path}),
    ]
    for model in (brief.path, "prod"):
        attempts.append(
            await rig.tenant.post("/sample", wire.SampleRequest(model=model, prompts=["x"]))
        )
        chat = {"model": model, "messages": [{"role": "user", "content": "x"}]}
        attempts.append(await rig.tenant.http.post("/v1/chat/completions", json=chat))
    assert [answer.status_code for answer in attempts] == [404] * len(attempts)
    await eventually(lambda: folders(rig) == [lasting.checkpoint_id])
    async with asyncio.timeout(5):
        while not (await checkpoint_rows(postgres_url))["brief"]:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.05)
    assert await checkpoint_rows(postgres_url) == {"lasting": False, "brief": True}


async def test_a_replaced_checkpoint_s_files_go(rig: Rig) -> None:
    """Saving under a name again leaves the files of the new one alone."""
    run = await rig.tenant.new_run()
    await rig.tenant.save(run.run_id, 1, "x")
    second = await rig.tenant.save(run.run_id, 2, "x")
    await eventually(lambda: folders(rig) == [second.checkpoint_id])
    files = await rig.tenant.get("/checkpoints/files", path=second.path)
    assert files.status_code == 200


async def test_deleting_twice_is_deleting_once(rig: Rig) -> None:
    """Files go at once; again it is no error, for a stranger it is none of theirs, and the name is free again."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    stranger = await rig.stranger.http.delete(ROUTE, params={"path": saved.path})
    assert stranger.status_code == 404
    for _ in range(2):
        deleted = await rig.tenant.http.delete(ROUTE, params={"path": saved.path})
        assert deleted.status_code == 204
        assert folders(rig) == []
    stranger = await rig.stranger.http.delete(ROUTE, params={"path": saved.path})
    assert stranger.status_code == 404
    again = await rig.tenant.save(run.run_id, 2, "x")
    assert again.path == saved.path
    assert folders(rig) == [again.checkpoint_id]


async def test_the_sweeper_waits_and_leaves_what_is_not_ours(rig: Rig, tmp_path: Path) -> None:
    """Within the grace nothing goes; files outside the store are nobody's to remove; an absent store is tried again."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    await rig.services.pool.execute("update checkpoint set expires_at = now() + interval '1 hour'")
    url = rig.store.as_uri()
    assert await sweep(rig.services.pool, url, grace_s=0) == 0
    await rig.services.pool.execute("update checkpoint set expires_at = null, deleted_at = now()")
    elsewhere = (tmp_path / "elsewhere").as_uri()
    assert await sweep(rig.services.pool, elsewhere, grace_s=0) == 0
    assert await sweep(rig.services.pool, url, grace_s=3600) == 0
    await eventually(lambda: folders(rig) == [])  # by the gateway's own, without grace
    assert saved.checkpoint_id not in folders(rig)


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def s3_rig(
    postgres_url: str, nats_url: str, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Rig, Callable[[], list[str]]]]:
    """A rig with its store on S3, and what lists the objects there."""
    url = use_s3(s3, monkeypatch)
    bucket = urlsplit(url).netloc

    def objects() -> list[str]:
        return [
            item["Key"] for item in s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        ]

    async with running_rig(postgres_url, nats_url, tmp_path, store_url=url) as running:
        yield running, objects


async def test_files_on_s3(s3_rig: tuple[Rig, Callable[[], list[str]]]) -> None:
    """They are listed with their checksums, downloaded whole and in parts, and removed."""
    rig, objects = s3_rig
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    answer = await rig.tenant.get("/checkpoints/files", path=saved.path)
    files = msgspec.json.decode(answer.content, type=wire.Page).files
    assert files is not None
    assert [file.name for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert files[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    where = {"path": saved.path, "name": "adapter_model.safetensors"}
    assert (await rig.tenant.get("/checkpoints/file", **where)).content == WEIGHTS
    part = await rig.tenant.http.get(
        f"{ROUTE}/file", params=where, headers={"range": "bytes=90-94"}
    )
    assert (part.status_code, part.content) == (206, WEIGHTS[90:95])
    assert len(objects()) == 3
    assert (await rig.tenant.http.delete(ROUTE, params={"path": saved.path})).status_code == 204
    assert objects() == []


async def test_files_that_are_gone_or_damaged_are_told_apart(rig: Rig) -> None:
    """Without its files a checkpoint is 404; with a manifest that cannot be read it is an error of ours."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    manifest = rig.store / "checkpoints" / saved.checkpoint_id / "manifest.json"
    manifest.write_bytes(b"{")
    damaged = await rig.tenant.get("/checkpoints/files", path=saved.path)
    assert damaged.status_code == 500
    assert "damaged" in error_of(damaged).message
    manifest.unlink()
    assert (await rig.tenant.get("/checkpoints/files", path=saved.path)).status_code == 404


async def test_a_file_that_ends_early_breaks_off(rig: Rig) -> None:
    """A body is never shorter than it says without the connection showing it."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x")
    where = {"path": saved.path, "name": "adapter_model.safetensors"}
    path = rig.store / "checkpoints" / saved.checkpoint_id / where["name"]
    path.write_bytes(WEIGHTS[:50])
    with pytest.raises(httpx.RemoteProtocolError):
        await rig.tenant.get("/checkpoints/file", **where)


# ---- Starting from one -----------------------------------------------------------------------------------------------


async def test_a_run_starts_with_or_without_optimizer(rig: Rig) -> None:
    """Without `lora` the run has the checkpoint's shape; what differs is named with both values."""
    lora = wire.LoraConfig(rank=8, alpha=4.0, train_unembed=True)
    run = await rig.tenant.new_run(lora=lora)
    training = await rig.tenant.save(run.run_id, 1, "x")
    inference = await rig.tenant.save(run.run_id, 2, "x", mode="inference")

    for path, optimizer in ((training.path, True), (training.path, False), (inference.path, False)):
        made = await rig.tenant.new_run(checkpoint=path, optimizer=optimizer)
        assert (made.lora.rank, made.lora.alpha, made.lora.train_unembed) == (8, 4.0, True)
        task = rig.trainer.messages[-1].task
        assert isinstance(task, CreateRun)
        assert task.checkpoint is not None
        assert (task.optimizer, task.shape.rank) == (optimizer, 8)

    async def refusal(**changes: Any) -> wire.ErrorBody:
        asked = wire.CreateRun(session_id=run.session_id, base_model=BASE, **changes)
        answer = await rig.tenant.post("/runs", asked)
        assert answer.status_code == 422
        return error_of(answer)

    error = await refusal(checkpoint=inference.path)
    assert error.param == "checkpoint"
    assert "optimizer=False" in error.message
    error = await refusal(checkpoint=training.path, lora=wire.LoraConfig(rank=4, alpha=4.0))
    assert error.message == (
        f"checkpoint: {training.path} has rank 8 instead of 4 and train_unembed True instead of False"
    )


# ---- Imported --------------------------------------------------------------------------------------------------------


def adapter(rank: int = 4, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a small adapter."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **changes}
    ones = np.ones((8, rank), np.float32)
    return config, {f"{STEM}.lora_A.weight": ones.T.copy(), f"{STEM}.lora_B.weight": ones}


async def upload(
    tenant: Tenant,
    config: dict[str, Any] | bytes,
    weights: dict[str, np.ndarray] | bytes,
    headers: dict[str, str] | None = None,
    **params: Any,
) -> httpx.Response:
    """Sends an adapter's files."""
    encoded = config if isinstance(config, bytes) else json.dumps(config).encode()
    body = weights if isinstance(weights, bytes) else save(weights)
    return await tenant.http.post(
        f"{ROUTE}/import",
        params={"base_model": BASE, "name": "theirs", **params},
        files={"config": ("adapter_config.json", encoded), "weights": ("a.safetensors", body)},
        headers=headers,
    )


async def test_an_imported_adapter_is_a_checkpoint(rig: Rig) -> None:
    """It is listed, served, downloaded, started from without optimizer and expires; its run is no run in training."""
    config, tensors = adapter()
    base_weight = np.zeros((8, 8), np.float32)
    extra = {"base_model.model.lm_head.base_layer.weight": base_weight}
    answer = await upload(rig.tenant, config, {**tensors, **extra}, ttl_s=3600)
    assert answer.status_code == 201, answer.text
    made = msgspec.json.decode(answer.content, type=wire.Checkpoint)
    assert (made.name, made.mode, made.base_model) == ("theirs", "inference", BASE)
    assert made.expires_at is not None
    assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] == [answer.json()]
    assert (await rig.tenant.get("/runs")).json()["runs"] == []

    sampled = await rig.tenant.post(
        "/sample", wire.SampleRequest(model=made.path, prompt_token_ids=[[1]], max_tokens=2)
    )
    assert sampled.status_code == 200
    used = next(engine.samples[-1].adapter for engine in rig.engines if engine.samples)
    assert used is not None
    assert used.name == made.checkpoint_id
    found = FileSets(rig.store.as_uri()).read(f"checkpoints/{made.checkpoint_id}")
    assert found is not None
    assert b"base_layer.weight" not in found[1]["adapter_model.safetensors"]

    run = await rig.tenant.new_run(checkpoint=made.path, optimizer=False)
    assert (run.lora.rank, run.lora.alpha, run.lora.train_mlp) == (4, 8.0, False)
    operation = wire.OptimStep(adam=wire.AdamParams(lr=1e-3))
    refused = await rig.tenant.submit(made.run_id, 1, operation)
    assert refused.status_code == 409
    assert "imported" in error_of(refused).message


async def test_an_upload_sent_again_is_one_import(rig: Rig) -> None:
    """The same request makes the same checkpoint; another one makes another; a stranger sees neither."""
    files = adapter()
    answers = [await upload(rig.tenant, *files, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["checkpoint_id"] == answers[1].json()["checkpoint_id"]
    await upload(rig.tenant, *files)
    assert len((await rig.tenant.get("/checkpoints")).json()["checkpoints"]) == 2
    assert (await rig.stranger.get("/checkpoints")).json()["checkpoints"] == []


def _pickle(_config: Any, _tensors: Any) -> tuple[Any, Any]:
    return adapter()[0], b"\x80\x05cos\nsystem\n(S'true'\ntR."


def _config(**changes: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda config, tensors: ({**config, **changes}, tensors)


def _tensors(**changes: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda config, tensors: (
        config,
        {**tensors, **{name.replace("__", "."): array for name, array in changes.items()}},
    )


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda config, tensors: (config, change(save(tensors)))


LAYER = "base_model.model.model.layers.0.mlp.experts"
REFUSED: dict[str, tuple[Callable[[Any, Any], tuple[Any, Any]], str]] = {
    "a pickle": (_pickle, "is not a safetensors file"),
    "cut off": (_bytes(lambda data: data[:-4]), "its header says"),
    "too long": (_bytes(lambda data: data + b"1234"), "its header says"),
    "no header": (_bytes(lambda _: b"\x08"), "ends within its header"),
    "a header of nonsense": (
        _bytes(lambda _: b"\x02" + bytes(7) + b"[]"),
        "not a safetensors file",
    ),
    "overlapping tensors": (
        _bytes(lambda data: data.replace(b"[128,256]", b"[0,128]  ")),
        "do not fit its shape and place",
    ),
    "DoRA": (_config(use_dora=True), "use_dora is True"),
    "another method": (_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "a bias": (_config(bias="all"), "bias is 'all'"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "an init that changes the base": (_config(init_lora_weights="pissa"), "init_lora_weights"),
    "no rank": (_config(r=0), "must be positive"),
    "a rank that is not the tensors'": (_config(r=3), "do not fit the rank 3"),
    "a pattern that computes": (_config(rank_pattern={"(a+)+$": 3}), "more than the end of a name"),
    "a config of nonsense": (lambda _, tensors: (b"{", tensors), "adapter_config.json"),
    "an unknown tensor": (_tensors(x=np.ones((1, 1), np.float32)), "tensor x: only lora_A"),
    "embeddings": (
        _tensors(base_model__model__model__embed_tokens__lora_A__weight=np.ones((4, 8))),
        "only attention, MLPs, experts and lm_head",
    ),
    "half a pair": (
        _tensors(**{f"{STEM.replace('q_proj', 'k_proj')}.lora_A.weight": np.ones((4, 8), "f4")}),
        "has only lora_A",
    ),
    "a type that is not taken": (
        _tensors(**{f"{STEM}.lora_A.weight": np.ones((4, 8), "f8")}),
        "is F64, none of F32, F16, BF16",
    ),
    "one expert without the others": (
        lambda config, tensors: (
            config,
            {
                f"{LAYER}.1.gate_proj.lora_{factor}.weight": array
                for factor, array in zip("AB", tensors.values(), strict=True)
            },
        ),
        "experts.0.gate_proj: is missing",
    ),
    "down without gate and up": (
        lambda config, tensors: (
            config,
            {
                f"{LAYER}.lora_{factor}.weight": array
                for factor, array in zip("AB", tensors.values(), strict=True)
            },
        ),
        "gate and up are missing",
    ),
    "nothing": (lambda config, _: (config, {}), "holds 0 tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused(case: str) -> None:
    """With what is wrong with it, by file."""
    change, message = REFUSED[case]
    config, weights = change(*adapter())
    encoded = config if isinstance(config, bytes) else json.dumps(config).encode()
    body = weights if isinstance(weights, bytes) else save(weights)
    file = BytesIO(body)
    with pytest.raises(InvalidFieldError) as refusal:
        plan_import(
            encoded, read_header(file, len(body), WEIGHTS_FILE), file, base_model="river/base"
        )
    assert message in refusal.value.message
    assert refusal.value.param in (CONFIG_FILE, WEIGHTS_FILE)


async def test_a_refused_upload_leaves_nothing(rig: Rig) -> None:
    """Neither in the catalog nor in the store, whether its bytes are wrong or its rank is too high for the engines."""
    config, tensors = adapter()
    for answer, message in (
        (await upload(rig.tenant, config, b"\x80\x05cos\nsystem\n"), "not a safetensors file"),
        (await upload(rig.tenant, *adapter(rank=17)), "rank"),
    ):
        assert answer.status_code == 422, answer.text
        assert message in error_of(answer).message
    assert folders(rig) == []
    assert (await rig.tenant.get("/checkpoints")).json()["checkpoints"] == []
    assert (await upload(rig.tenant, config, tensors)).status_code == 201


async def test_uploads_have_limits(rig: Rig) -> None:
    """Too large a body is refused before it is read, too large a configuration by name, and what is missing is told."""
    config, tensors = adapter()
    large = {**config, "filler": "x" * limits.IMPORT_CONFIG_MAX_BYTES}
    answer = await upload(rig.tenant, large, tensors)
    assert answer.status_code == 413
    assert error_of(answer).param == "config"
    answer = await upload(rig.tenant, config, tensors, base_model="nobody/nothing")
    assert (answer.status_code, error_of(answer).param) == (404, "base_model")
    answer = await upload(rig.tenant, config, tensors, name="-x")
    assert (answer.status_code, error_of(answer).param) == (422, "name")
    only_one = await rig.tenant.http.post(
        f"{ROUTE}/import",
        params={"base_model": BASE, "name": "x"},
        files={"weights": ("a", save(tensors))},
    )
    assert (only_one.status_code, error_of(only_one).param) == (422, "config")

    host, _, port = rig.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"POST {ROUTE}/import?base_model={BASE}&name=x HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {rig.tenant.secret}\r\n"
        f"content-type: multipart/form-data; boundary=b\r\n"
        f"content-length: {limits.IMPORT_MAX_BYTES + 1}\r\n\r\n".encode()
    )
    status = await reader.readline()
    writer.close()
    assert b" 413 " in status


async def test_a_full_disk_is_507(rig: Rig) -> None:
    """An adapter that grows over what the disk takes, by filling its ranks up, leaves nothing."""
    config, tensors = adapter(rank=16)
    thin = {"k_proj": 1}
    for layer in range(12):
        stem = f"base_model.model.model.layers.{layer}.self_attn.k_proj"
        tensors[f"{stem}.lora_A.weight"] = np.ones((1, 8192), np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.ones((8192, 1), np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, hard))
    try:
        answer = await upload(rig.tenant, {**config, "rank_pattern": thin}, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.status_code == 507
    assert folders(rig) == []
    answer = await upload(rig.tenant, {**config, "rank_pattern": thin}, tensors)
    assert answer.status_code == 201
