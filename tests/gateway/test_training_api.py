"""The training API over real Postgres and NATS: submitting, waiting, sampling, checkpoints, administration."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import asyncpg
import httpx
import msgspec
import numpy as np
import pytest
from support.gateway import Rig, error_of, eventually
from support.stand_ins import BASE, CONTEXT_LENGTH, VOCAB_SIZE

from river_billing.events import UsageEvent, UsageKind
from river_billing.partitions import ensure_partitions
from river_billing.usage import record_usage
from river_client import wire
from river_trainer import protocol

ADAM = wire.AdamParams(lr=1e-3)
DATUM = wire.Datum(input_ids=[1, 2, 3])
MSGPACK = "application/msgpack"


# ---- Operations ------------------------------------------------------------------------------------------------------


async def test_a_run_and_its_operations(rig: Rig) -> None:
    """A run is created as operation 0 and takes operations; each result is found by its id."""
    run = await rig.tenant.new_run(lora=wire.LoraConfig(rank=4, train_unembed=True))
    assert run.lora.alpha == 32
    assert run.lora.seed is not None
    assert run.tags == {"who": "test"}
    accepted = await rig.tenant.submit(run.run_id, 1, wire.TrainStep(data=[DATUM], adam=ADAM))
    assert accepted.status_code == 202
    assert accepted.json() == {"operation_id": f"{run.run_id}-1"}
    result = await rig.tenant.result(f"{run.run_id}-1")
    assert result.status == "done"
    assert result.policy_version == f"{run.run_id}@1"
    assert result.logprobs is not None
    assert result.logprobs[0].shape == (3,)
    first, second = rig.trainer.messages
    assert isinstance(first.task, protocol.CreateRun)
    assert first.task.shape.rank == 4
    assert (second.run_id, second.seq, second.tenant_id) == (run.run_id, 1, rig.tenant.tenant_id)
    assert isinstance(second.task, protocol.TrainStep)
    assert second.task.data[0].input_ids == np.array([1, 2, 3], "<i4").tobytes()
    listed = (await rig.tenant.get("/runs")).json()["runs"]
    assert [listed_run["run_id"] for listed_run in listed] == [run.run_id]
    assert (await rig.tenant.get(f"/runs/{run.run_id}")).json()["lora"]["rank"] == 4


async def test_conditions_reach_the_trainer(rig: Rig) -> None:
    """Every kind of operation takes the version that it is for, and those with gradients whether to begin anew."""
    run = await rig.tenant.new_run()
    version = f"{run.run_id}@0"
    asked: list[wire.AnyOperation] = [
        wire.Forward(data=[DATUM], expected_policy=version),
        wire.ForwardBackward(data=[DATUM], expected_policy=version, zero_gradients=True),
        wire.OptimStep(adam=ADAM, expected_policy=version),
        wire.TrainStep(data=[DATUM], adam=ADAM, expected_policy=version, zero_gradients=True),
        wire.SaveWeights(name="x", expected_policy=version),
        wire.Unload(expected_policy=version),
    ]
    for seq, operation in enumerate(asked, 1):
        accepted = await rig.tenant.submit(run.run_id, seq, operation)
        assert accepted.status_code == 202
        await rig.tenant.result(f"{run.run_id}-{seq}")
    tasks = [message.task for message in rig.trainer.messages[1:]]
    assert [task.expected_policy for task in tasks] == [version] * len(asked)
    zeroing = [getattr(task, "zero_gradients", None) for task in tasks]
    assert zeroing == [None, True, None, True, None, None]
    assert isinstance(tasks[-1], protocol.Unload)
    wrong = wire.OptimStep(adam=ADAM, expected_policy="run_other@0")
    refused = await rig.tenant.submit(run.run_id, len(asked) + 1, wrong)
    assert refused.status_code == 422
    assert error_of(refused).param == "expected_policy"


async def test_an_operation_sent_twice_is_one(rig: Rig) -> None:
    """The same (run, seq) again gets the same id, and the journal holds it once."""
    run = await rig.tenant.new_run()
    step = wire.TrainStep(data=[DATUM], adam=ADAM)
    answers = [await rig.tenant.submit(run.run_id, 1, step) for _ in range(3)]
    assert {answer.json()["operation_id"] for answer in answers} == {f"{run.run_id}-1"}
    info = await rig.nats.jetstream().stream_info(protocol.TRAIN_STREAM)
    assert info.state.messages == 2


async def test_a_large_body_goes_through_the_object_store(rig: Rig) -> None:
    """A body over the inline limit arrives whole, packed tensors and msgpack included."""
    run = await rig.tenant.new_run()
    ids = np.arange(CONTEXT_LENGTH, dtype="<i8") % VOCAB_SIZE
    tensor = wire.Tensor(dtype="int64", shape=(CONTEXT_LENGTH,), data=ids.tobytes())
    submitted = wire.SubmitOperation(
        seq=1, operation=wire.Forward(data=[wire.Datum(input_ids=tensor)] * 4000)
    )
    answer = await rig.tenant.post(
        f"/runs/{run.run_id}/operations",
        msgspec.msgpack.encode(submitted),
        headers={"content-type": MSGPACK, "accept": MSGPACK},
    )
    accepted = msgspec.msgpack.decode(answer.content, type=wire.OperationAccepted)
    await rig.tenant.result(accepted.operation_id)
    task = rig.trainer.messages[-1].task
    assert isinstance(task, protocol.Forward)
    assert len(task.data) == 4000
    assert task.data[-1].input_ids == ids.astype("<i4").tobytes()


async def test_a_long_poll_ends_with_the_result(rig: Rig) -> None:
    """A poll that began before the result gets it; one that times out says pending; the gateway's stop ends one."""
    run = await rig.tenant.new_run()
    rig.trainer.answering = False
    await rig.tenant.submit(run.run_id, 1, wire.OptimStep(adam=ADAM))
    operation = f"{run.run_id}-1"
    assert (await rig.tenant.result(operation, timeout_s=0)).status == "pending"
    assert (await rig.tenant.result(operation, timeout_s=0.05)).status == "pending"
    polling = asyncio.create_task(rig.tenant.result(operation))
    await eventually(lambda: len(rig.trainer.messages) == 2)
    error = protocol.TaskError(type="invalid_request", message="no gradients", param=None)
    await rig.trainer.answer(rig.trainer.messages[-1], error=error)
    result = await polling
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.message == "no gradients"
    polling = asyncio.create_task(rig.tenant.result(f"{run.run_id}-2"))
    await asyncio.sleep(0.05)
    rig.services.stopping.set()
    assert (await polling).status == "pending"


async def test_nothing_is_accepted_that_is_not_stored(rig: Rig) -> None:
    """Without a journal a submission is 503, and a new run leaves nothing behind."""
    run = await rig.tenant.new_run()
    await rig.trainer.subscription.unsubscribe()
    await rig.nats.jetstream().delete_stream(protocol.TRAIN_STREAM)
    answer = await rig.tenant.submit(run.run_id, 1, wire.OptimStep(adam=ADAM))
    assert answer.status_code == 503
    assert float(answer.headers["retry-after"]) > 0
    assert error_of(answer).request_id == answer.headers["x-request-id"]
    session = (await rig.tenant.post("/sessions", wire.CreateSession())).json()["session_id"]
    answer = await rig.tenant.post("/runs", wire.CreateRun(session_id=session, base_model=BASE))
    assert answer.status_code == 503
    assert len((await rig.tenant.get("/runs")).json()["runs"]) == 1


async def test_what_is_made_twice_under_one_key_is_one(rig: Rig) -> None:
    """A session or run whose answer was lost is found again by its idempotency key, by the same tenant only."""
    key = {"idempotency-key": "k1"}
    sessions = [
        (await tenant.post("/sessions", wire.CreateSession(), headers=key)).json()["session_id"]
        for tenant in (rig.tenant, rig.tenant, rig.stranger)
    ]
    assert sessions[0] == sessions[1] != sessions[2]
    asked = wire.CreateRun(session_id=sessions[0], base_model=BASE)
    answers = [await rig.tenant.post("/runs", asked, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    own = msgspec.structs.replace(asked, session_id=sessions[2])
    stranger = await rig.stranger.post("/runs", own, headers=key)
    assert stranger.json()["run_id"] != answers[0].json()["run_id"]
    assert len((await rig.tenant.get("/runs")).json()["runs"]) == 1
    info = await rig.nats.jetstream().stream_info(protocol.TRAIN_STREAM)
    assert info.state.messages == 2
    other = msgspec.structs.replace(asked, lora=wire.LoraConfig(rank=2))
    assert (await rig.tenant.post("/runs", other, headers=key)).status_code == 409
    long = {"idempotency-key": "k" * 257}
    assert (
        await rig.tenant.post("/sessions", wire.CreateSession(), headers=long)
    ).status_code == 422


# ---- Checkpoints and aliases -----------------------------------------------------------------------------------------


async def test_a_checkpoint_s_life(rig: Rig) -> None:
    """A saved checkpoint is listed at once, downloads in parts, can be started from, and is gone when deleted."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final")
    assert saved.path == f"river://{run.run_id}/weights/final"
    listed = (await rig.tenant.get("/checkpoints")).json()["checkpoints"]
    assert [checkpoint["path"] for checkpoint in listed] == [saved.path]
    files = (await rig.tenant.get("/checkpoints/files", path=saved.path)).json()["files"]
    assert {file["name"]: file["size_bytes"] for file in files} == {
        "adapter_config.json": 2,
        "adapter_model.safetensors": 100,
    }
    where = {"path": saved.path, "name": "adapter_model.safetensors"}
    whole = await rig.tenant.get("/checkpoints/file", **where)
    assert whole.content == bytes(range(100))
    for asked, start, end in (("bytes=90-", 90, 100), ("bytes=0-9", 0, 10), ("bytes=-5", 95, 100)):
        part = await rig.tenant.http.get(
            "/river/v1/checkpoints/file", params=where, headers={"range": asked}
        )
        assert part.status_code == 206
        assert part.content == bytes(range(start, end))
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/100"
    for name in ("nothing", "../../etc/passwd", ""):
        answer = await rig.tenant.get("/checkpoints/file", path=saved.path, name=name)
        assert answer.status_code == 404
    again = await rig.tenant.new_run(checkpoint=saved.path)
    task = rig.trainer.messages[-1].task
    assert isinstance(task, protocol.CreateRun)
    assert task.checkpoint is not None
    assert task.checkpoint.endswith(saved.checkpoint_id)
    loaded = await rig.tenant.submit(again.run_id, 1, wire.LoadWeights(path=saved.path))
    assert loaded.status_code == 202
    deleted = await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": saved.path})
    assert deleted.status_code == 204
    assert (await rig.tenant.get("/checkpoints", path=saved.path)).status_code == 404
    assert not list(rig.store.glob("checkpoints/ckpt_*/*"))


async def test_a_checkpoint_must_fit(rig: Rig) -> None:
    """Weights of another shape, or without the optimizer that is wanted, are refused by name."""
    run = await rig.tenant.new_run()
    other = await rig.tenant.new_run(lora=wire.LoraConfig(rank=8))
    inference = await rig.tenant.save(run.run_id, 1, "x", mode="inference")
    training = await rig.tenant.save(run.run_id, 2, "x")
    for run_id, path in ((run.run_id, inference.path), (other.run_id, training.path)):
        answer = await rig.tenant.submit(run_id, 3, wire.LoadWeights(path=path))
        assert answer.status_code == 422
        assert error_of(answer).param == "path"
    weights_only = wire.LoadWeights(path=inference.path, optimizer=False)
    assert (await rig.tenant.submit(run.run_id, 3, weights_only)).status_code == 202


async def test_aliases(rig: Rig) -> None:
    """An alias is written, moved and removed; it may not hide a base model or point nowhere."""
    run = await rig.tenant.new_run()
    url = "/river/v1/aliases/prod"
    for target in (f"river://{run.run_id}", (await rig.tenant.save(run.run_id, 1, "a")).path):
        assert (await rig.tenant.http.put(url, json={"target": target})).json()["target"] == target
    assert len((await rig.tenant.get("/aliases")).json()["aliases"]) == 1
    target = f"river://{run.run_id}"
    for name, body, status in (
        ("prod", {"target": "river://run_0"}, 404),
        ("prod", {"target": "nothing"}, 422),
        ("-x", {"target": target}, 422),
    ):
        answer = await rig.tenant.http.put(f"/river/v1/aliases/{name}", json=body)
        assert answer.status_code == status
    assert (await rig.tenant.http.delete(url)).status_code == 204
    assert (await rig.tenant.http.delete(url)).status_code == 404


# ---- Sampling --------------------------------------------------------------------------------------------------------


async def test_sampling(rig: Rig) -> None:
    """Samples come back by prompt, name their version, and are billed once a prompt."""
    run = await rig.tenant.new_run()
    asked = wire.SampleRequest(
        model=f"river://{run.run_id}",
        prompt_token_ids=[[5, 6, 7], [8]],
        num_samples=2,
        max_tokens=4,
        logprobs=1,
    )
    answer = await rig.tenant.post("/sample", asked)
    assert answer.status_code == 200
    response = msgspec.json.decode(answer.content, type=wire.SampleResponse)
    assert response.policy_version == f"{run.run_id}@0"
    assert [len(group.samples) for group in response.groups] == [2, 2]
    assert response.groups[0].samples[0].top_logprobs == [
        [wire.TopLogprob(token=3, logprob=-0.5)],
        [wire.TopLogprob(token=4, logprob=-0.25)],
    ]
    assert response.usage == wire.TokenUsage(
        prompt_tokens=4, cached_prompt_tokens=2, completion_tokens=8
    )
    (event,) = await rig.usage(1)
    assert event.quantities == {
        UsageKind.PROMPT: 2,
        UsageKind.CACHED_PROMPT: 2,
        UsageKind.COMPLETION: 8,
    }
    sent = [sample for engine in rig.engines for sample in engine.samples]
    assert sent[0].adapter is not None
    assert sent[0].adapter.name == f"{run.run_id}@0"


async def test_what_a_sample_may_ask_reaches_the_engine(rig: Rig) -> None:
    """Stops, scores of prompts and open ends arrive as asked; tables may have a row more than is scored."""
    targets: list[wire.Numbers] = [[[1, -1], [2, 3], [0, 0]]]
    asked = wire.SampleRequest(
        model=BASE,
        prompt_token_ids=[[5, 6, 7]],
        max_tokens=None,
        stop_token_ids=[4],
        ignore_eos=True,
        prompt_top_logprobs=2,
        prompt_logprobs_last=1,
        prompt_targets=targets,
    )
    answer = await rig.tenant.post("/sample", asked)
    group = msgspec.json.decode(answer.content, type=wire.SampleResponse).groups[0]
    assert group.cached_prompt_tokens == 1
    assert group.prompt_top_logprobs is not None
    assert group.prompt_top_logprobs.token_ids.shape == (3, 2)
    assert group.prompt_target_logprobs is not None
    assert group.prompt_target_logprobs.shape == (2, 2)
    assert np.frombuffer(group.prompt_target_logprobs.data, "<f4").tolist() == [1, -1, 2, 3]
    (sent,) = [sample for engine in rig.engines for sample in engine.samples]
    assert (sent.max_tokens, sent.stop_token_ids, sent.ignore_eos) == (None, [4], True)
    assert (sent.prompt_top_logprobs, sent.prompt_logprobs_last) == (2, 1)


def wrong_samples() -> list[Any]:
    return [
        pytest.param({"prompts": None}, "prompts", id="no prompt"),
        pytest.param({"prompt_token_ids": [[1]]}, "prompts", id="both"),
        pytest.param({"prompts": [], "prompt_token_ids": None}, "prompts", id="none"),
        pytest.param(
            {"prompts": None, "prompt_token_ids": [[1], [1, VOCAB_SIZE]]},
            "prompt_token_ids[1][1]",
            id="vocabulary",
        ),
        pytest.param(
            {"prompts": None, "prompt_token_ids": [[1] * CONTEXT_LENGTH]},
            "prompt_token_ids[0]",
            id="context",
        ),
        pytest.param({"temperature": -1.0}, "temperature", id="temperature"),
        pytest.param({"top_p": 0.0}, "top_p", id="top_p"),
        pytest.param({"top_k": 0}, "top_k", id="top_k"),
        pytest.param({"num_samples": 0}, "num_samples", id="num_samples"),
        pytest.param({"max_tokens": -1}, "max_tokens", id="max_tokens"),
        pytest.param({"temperature": 2.5}, "temperature", id="too hot"),
        pytest.param({"stop": [""]}, "stop[0]", id="stop"),
        pytest.param({"stop_token_ids": [1, VOCAB_SIZE]}, "stop_token_ids[1]", id="stop token"),
        pytest.param({"stop_token_ids": [1] * 129}, "stop_token_ids", id="stop tokens"),
        pytest.param({"logprobs": 257}, "logprobs", id="logprobs"),
        pytest.param({"prompt_top_logprobs": -1}, "prompt_top_logprobs", id="prompt top"),
        pytest.param({"prompt_logprobs_last": 0}, "prompt_logprobs_last", id="last"),
        pytest.param({"prompt_targets": [[[1]]]}, "prompt_targets", id="targets of text"),
        *(
            pytest.param(
                {"prompts": None, "prompt_token_ids": [[1, 2, 3]], "prompt_targets": targets},
                param,
                id=f"targets {number}",
            )
            for number, (targets, param) in enumerate(
                [
                    ([], "prompt_targets"),
                    ([[[1, 2]]], "prompt_targets[0]"),
                    ([[[1, 2], [3, -2]]], "prompt_targets[0][1][1]"),
                    ([[[1, 2], [VOCAB_SIZE, 2]]], "prompt_targets[0][1][0]"),
                ]
            )
        ),
    ]


@pytest.mark.parametrize(("change", "param"), wrong_samples())
async def test_wrong_samples(rig: Rig, change: dict[str, Any], param: str) -> None:
    """A wrong sampling request never reaches an engine."""
    asked = wire.SampleRequest(model=BASE, prompts=["hi"], max_tokens=4)
    answer = await rig.tenant.post("/sample", msgspec.structs.replace(asked, **change))
    assert answer.status_code == 422
    assert error_of(answer).param == param
    assert not any(engine.samples for engine in rig.engines)


async def test_an_engine_s_own_refusal_of_a_sample(rig: Rig) -> None:
    """What only the engine can know is refused in its words."""
    for engine in rig.engines:
        engine.behaviour = "refuse"
    answer = await rig.tenant.post(
        "/sample", wire.SampleRequest(model=BASE, prompts=["long"], max_tokens=4)
    )
    assert answer.status_code == 422
    assert error_of(answer).param == "prompts[0]"


# ---- Around it -------------------------------------------------------------------------------------------------------


async def test_administration(rig: Rig) -> None:
    """An administrator makes tenants and keys; a key's secret is shown once; nobody else may."""
    made = await rig.admin.post("/tenants", wire.CreateTenant(name="new"))
    assert made.status_code == 201
    assert (await rig.admin.post("/tenants", wire.CreateTenant(name="new"))).status_code == 409
    tenant_id = made.json()["tenant_id"]
    key = (await rig.admin.post("/keys", wire.CreateKey(tenant=tenant_id))).json()
    assert key["secret"].startswith("rv-")
    listed = (await rig.admin.get("/keys", tenant="new")).json()["keys"]
    assert [(one["key_id"], one.get("secret")) for one in listed] == [(key["key_id"], None)]
    bad = wire.CreateKey(tenant=tenant_id, scopes=["infer", "root"])
    assert error_of(await rig.admin.post("/keys", bad)).param == "scopes[1]"
    bad = wire.CreateKey(tenant=tenant_id, expires_at="tomorrow")
    assert error_of(await rig.admin.post("/keys", bad)).param == "expires_at"
    expired = wire.CreateKey(tenant=tenant_id, expires_at="2020-01-01T00:00:00+00:00")
    secret = (await rig.admin.post("/keys", expired)).json()["secret"]
    answer = await rig.admin.http.get(
        "/river/v1/runs", headers={"authorization": f"Bearer {secret}"}
    )
    assert answer.status_code == 401
    assert (await rig.tenant.get("/tenants")).status_code == 403
    assert (await rig.admin.get("/runs")).status_code == 403


async def test_usage_and_prices(rig: Rig, postgres_url: str) -> None:
    """A tenant sees its own usage, an administrator anybody's."""
    await rig.tenant.openai.completions.create(model=BASE, prompt="hi")
    await rig.stranger.openai.completions.create(model=BASE, prompt="hi")
    events: list[UsageEvent] = await rig.usage(2)
    connection: Any = await asyncpg.connect(postgres_url)
    try:
        moments = [dt.datetime.fromtimestamp(event.occurred_at, dt.UTC) for event in events]
        await ensure_partitions(connection, moments)
        await record_usage(connection, events)
    finally:
        await connection.close()
    own = (await rig.tenant.get("/usage")).json()["usage"]
    assert {line["tenant"] for line in own} == {rig.tenant.tenant_id}
    assert {line["kind"] for line in own} == {"prompt", "cached_prompt", "completion"}
    everybody = (await rig.admin.get("/usage", tenant="*")).json()["usage"]
    assert {line["tenant"] for line in everybody} == {rig.tenant.tenant_id, rig.stranger.tenant_id}
    assert (await rig.tenant.get("/usage", tenant="*")).status_code == 403
    assert (await rig.tenant.get("/usage", since="2099-01-01T00:00:00+00:00")).json()["usage"] == []
    assert error_of(await rig.tenant.get("/usage", since="today")).param == "since"
    assert "prices" in (await rig.tenant.get("/prices")).json()


async def test_models_health_and_schema(rig: Rig) -> None:
    """Models say what they can take; probes, metrics and the schema answer without a key."""
    (model,) = (await rig.tenant.get("/models")).json()["models"]
    assert model == {
        "name": BASE,
        "context_length": CONTEXT_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "max_lora_rank": 16,
        "trainable": True,
        "servable": True,
    }
    async with httpx.AsyncClient(base_url=rig.url) as anonymous:
        assert (await anonymous.get("/healthz")).text == "ok\n"
        assert (await anonymous.get("/readyz")).text == "ready\n"
        metrics = (await anonymous.get("/metrics")).text
        assert (
            'river_gateway_requests_total{method="GET",route="/river/v1/models",status="200"} 1.0'
            in metrics
        )
        schema = (await anonymous.get("/schema")).json()
        operation = schema["paths"]["/river/v1/runs/{run_id}/operations"]["post"]
        assert operation["requestBody"]["content"]
        assert (await anonymous.get("/river/v1/runs")).status_code == 401
    for record in [engine.record(heartbeat_at=0.0) for engine in rig.engines]:
        bucket = await rig.nats.jetstream().key_value("engines")
        await bucket.put(record.engine_id, msgspec.msgpack.encode(record))
    await eventually(lambda: not rig.services.engines.alive())
    assert (await rig.tenant.http.get("/readyz")).status_code == 503


async def test_metrics_of_a_run(rig: Rig, postgres_url: str) -> None:
    """A user's own metrics are kept with the run; what is not finite is refused."""
    run = await rig.tenant.new_run()
    path = f"/runs/{run.run_id}/metrics"
    assert (
        await rig.tenant.post(path, wire.LogMetrics(metrics={"reward": 0.5}, step=3))
    ).status_code == 204
    bad = msgspec.msgpack.encode(wire.LogMetrics(metrics={"reward": float("nan")}))
    answer = await rig.tenant.post(path, bad, headers={"content-type": MSGPACK})
    assert answer.status_code == 422
    assert error_of(answer).param == "metrics.reward"
    connection = await asyncpg.connect(postgres_url)
    try:
        row = await connection.fetchrow("select step, metrics from run_metric")
        assert row is not None
        assert (row["step"], row["metrics"]) == (3, '{"reward": 0.5}')
    finally:
        await connection.close()
