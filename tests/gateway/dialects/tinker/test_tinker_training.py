"""Training through the Tinker dialect's routes: order, repetition, waiting, and failing in one's turn."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import numpy as np
import zstandard
from support.gateway import Rig, eventually
from support.stand_ins import BASE
from support.tinker import (
    LORA,
    PROTOBUF,
    TinkerUser,
    chunk,
    datum,
    forward_backward,
    plain_datum,
    tensor,
)

from river_gateway.dialects.tinker import messages_pb2 as pb
from river_trainer import protocol


async def test_the_life_of_a_model(rig: Rig) -> None:
    """A client's first steps, its training, and a checkpoint, each named as the client makes names up itself."""
    user = TinkerUser(rig.tenant)
    config = (await user.post("/client/config", {"sdk_version": "0.38.0"})).json()
    assert config["pjwt_auth_enabled"] is False
    assert (await user.post("/client/dynamic_config")).json()["sample_cancel_enabled"] is True
    session = await user.new_session()
    model = await user.new_model(session, 4)
    assert model == f"{session}:train:4"
    info = (await user.post("/get_info", {"model_id": model, "type": "get_info"})).json()
    assert (info["model_name"], info["lora_rank"], info["is_lora"]) == (BASE, 4, True)
    answer = await user.trained(forward_backward(model, 1, plain_datum(4), plain_datum(3)))
    assert answer.headers["content-type"] == PROTOBUF
    output = pb.ForwardBackwardOutput.FromString(answer.content)
    assert output.loss_fn_outputs[0].num_datums == 2
    offsets = np.frombuffer(output.loss_fn_outputs[0].fields["logprobs"].offsets, "<i8")
    assert offsets.tolist() == [0, 16, 28]
    step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 1e-3}}
    accepted = await user.accepted("/optim_step", step)
    assert (await user.result(accepted["request_id"])).json() == {"metrics": {"loss_sum": 1.5}}
    saved = await user.accepted("/save_weights", {"model_id": model, "path": "a", "seq_id": 3})
    result = (await user.result(saved["request_id"])).json()
    assert result["path"] == f"tinker://{model}/weights/a"
    tasks = [message.task for message in rig.trainer.messages]
    assert isinstance(tasks[0], protocol.CreateRun)
    assert (tasks[0].shape.rank, tasks[0].shape.alpha) == (LORA["rank"], 32.0)
    assert isinstance(tasks[2], protocol.OptimStep)
    assert tasks[2].adam == protocol.Adam(
        lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=None
    )


async def test_a_model_asked_for_twice_is_one(rig: Rig) -> None:
    """The same number of the same session is the same run, with a shape of its own that may not change."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    assert await user.new_model(session, 0) == await user.new_model(session, 0)
    assert await _stored(rig) == 1
    other = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
    changed = await user.post("/create_model", other | {"lora_config": LORA | {"rank": 8}})
    assert changed.status_code == 422
    assert changed.json()["detail"].startswith("model_seq_id: 0 is of another model")


async def test_operations_come_in_any_order(rig: Rig) -> None:
    """What comes before what it comes after is accepted at once, and an operation sent twice is one."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    ids: dict[int, str] = {}
    for seq in (3, 2, 1, 2):
        options = {"content_type": PROTOBUF, "x_idempotency_key": f"key-{seq}"}
        body = forward_backward(model, seq)
        accepted = await user.accepted("/forward_backward", content=body, **options)
        assert ids.setdefault(seq, accepted["request_id"]) == accepted["request_id"]
    assert {message.seq for message in rig.trainer.messages} == {0, 1, 2, 3}
    assert await _stored(rig) == 4


async def _stored(rig: Rig) -> int:
    """How many operations the journal holds."""
    return (await rig.nats.jetstream().stream_info(protocol.TRAIN_STREAM)).state.messages


async def test_bodies_may_be_compressed(rig: Rig) -> None:
    """A body under zstd is the same; one that is none is 400 with a sentence, under another encoding too."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    packed = zstandard.compress(forward_backward(model, 1, *[plain_datum(60)] * 500))
    answer = await user.trained(packed, content_encoding="zstd")
    output = pb.ForwardBackwardOutput.FromString(answer.content)
    assert output.loss_fn_outputs[0].num_datums == 500
    for encoding in ("zstd", "br"):
        options = {"content_type": PROTOBUF, "content_encoding": encoding}
        wrong = await user.post("/forward_backward", content=b"nothing of it", **options)
        assert wrong.status_code == 400
        assert wrong.json()["detail"]


async def test_older_clients_speak_json(rig: Rig) -> None:
    """A JSON body of `/forward_backward` or `/forward` is answered in JSON to a client that reads no protobuf."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    inputs = {"target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]}}
    data = {"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": inputs}
    given = {"data": [data], "loss_fn": "cross_entropy"}
    for seq, (route, field) in enumerate(
        (("/forward_backward", "forward_backward_input"), ("/forward", "forward_input")), 1
    ):
        accepted = await user.accepted(route, {"model_id": model, "seq_id": seq, field: given})
        answer = await user.result(accepted["request_id"], accept="application/json")
        (output,) = answer.json()["loss_fn_outputs"]
        assert output["logprobs"] == {"data": [0, 0], "dtype": "float32", "shape": [2]}
    kinds = [type(message.task) for message in rig.trainer.messages]
    assert kinds[1:] == [protocol.ForwardBackward, protocol.Forward]


async def test_what_is_wrong_fails_in_its_turn(rig: Rig) -> None:
    """An operation whose data are wrong keeps its place, so that what was sent behind it goes on."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    outside = datum(chunk(1, 999), target_tokens=tensor([2, 3], "int64"))
    wrong = await user.trained(forward_backward(model, 1, outside))
    assert wrong.json() == {
        "error": "data[0].model_input[1]: 999 is outside the vocabulary of 512",
        "category": "user",
    }
    step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 99}}
    accepted = await user.accepted("/optim_step", step)
    assert (
        "adam_params.learning_rate: 99"
        in (await user.result(accepted["request_id"])).json()["error"]
    )
    dimuon = {"model_id": model, "seq_id": 3, "optimizer_params": {"type": "dimuon", "beta1": 0.9}}
    accepted = await user.accepted("/optim_step", dimuon)
    assert "'dimuon' is not offered" in (await user.result(accepted["request_id"])).json()["error"]
    path = f"tinker://{model}/weights/none"
    load = {"model_id": model, "seq_id": 4, "path": path, "optimizer": False}
    accepted = await user.accepted("/load_weights", load)
    assert "there is no checkpoint" in (await user.result(accepted["request_id"])).json()["error"]
    tasks = [message.task for message in rig.trainer.messages][1:]
    assert all(isinstance(task, protocol.Refused) for task in tasks)
    assert len(tasks) == 4


async def test_a_name_is_kept_unless_it_may_be_overwritten(rig: Rig) -> None:
    """A second checkpoint of a name fails with a sentence, and with `overwrite` takes its place."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    results = []
    for seq, overwrite in ((1, False), (2, False), (3, True)):
        body = {"model_id": model, "path": "a", "seq_id": seq, "overwrite": overwrite}
        accepted = await user.accepted("/save_weights", body)
        results.append((await user.result(accepted["request_id"])).json())
    assert "path" in results[0]
    assert results[1]["error"].startswith("path: there is a checkpoint 'a' already")
    assert results[2]["path"] == results[0]["path"]


async def test_a_pending_result_says_what_it_waits_for(rig: Rig) -> None:
    """408 with the state of the queue and a sentence, and the result as soon as there is one."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    rig.trainer.answering = False
    options = {"content_type": PROTOBUF}
    accepted = await user.accepted(
        "/forward_backward", content=forward_backward(model, 1), **options
    )
    waiting = asyncio.create_task(user.result(accepted["request_id"]))
    message = await eventually(lambda: next((m for m in rig.trainer.messages if m.seq == 1), None))
    rig.services.stopping.set()  # Whoever waits is answered at once.
    pending = await waiting
    assert pending.status_code == 408
    body = pending.json()
    assert body["type"] == "try_again"
    assert body["request_id"] == accepted["request_id"]
    assert body["queue_state"] == "paused_capacity"
    assert "no trainer answers" in body["queue_state_reason"]
    await rig.trainer.answer(message)
    answer = await eventually_done(user, accepted["request_id"])
    assert answer.headers["content-type"] == PROTOBUF


async def eventually_done(user: TinkerUser, request_id: str) -> httpx.Response:
    """The result, asked for as often as it takes."""
    async with asyncio.timeout(10):
        while True:
            answer = await user.result(request_id)
            if answer.status_code != 408:
                return answer
            await asyncio.sleep(0.05)


async def test_a_large_result_is_announced_first(rig: Rig) -> None:
    """A client that says it would like the size first gets it, and the whole result when it asks again."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    body = zstandard.compress(forward_backward(model, 1, *[plain_datum(60)] * 5000))
    options = {"content_type": PROTOBUF, "content_encoding": "zstd"}
    accepted = await user.accepted("/forward_backward", content=body, **options)
    asked = {"request_id": accepted["request_id"], "allow_metadata_only": True}
    announced = (await user.post("/retrieve_future", asked, accept=PROTOBUF)).json()
    assert announced["status"] == "complete_metadata"
    whole = await user.result(accepted["request_id"])
    assert len(whole.content) == announced["response_payload_size"] > 1024 * 1024


async def test_a_failure_of_ours_is_told_as_one(rig: Rig) -> None:
    """An operation that failed through no fault of its client says so."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    rig.trainer.answering = False
    options = {"content_type": PROTOBUF}
    accepted = await user.accepted(
        "/forward_backward", content=forward_backward(model, 1), **options
    )
    message = await eventually(lambda: next((m for m in rig.trainer.messages if m.seq == 1), None))
    await rig.trainer.answer(message, error=protocol.TaskError(type="internal", message="oh"))
    assert (await user.result(accepted["request_id"])).json() == {
        "error": "oh",
        "category": "server",
    }


async def test_models_from_checkpoints(rig: Rig) -> None:
    """A new model begins where a checkpoint ends, in the checkpoint's shape, and its result names both."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    model = await user.new_model(session, 0)
    saved = await user.accepted("/save_weights", {"model_id": model, "path": "a", "seq_id": 1})
    path = (await user.result(saved["request_id"])).json()["path"]
    body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
    accepted = await user.accepted("/load_weights", body)
    assert (await user.result(accepted["request_id"])).json() == {
        "type": "load_weights",
        "model_id": f"{session}:train:1",
        "path": path,
    }
    created = rig.trainer.messages[-1].task
    assert isinstance(created, protocol.CreateRun)
    assert (created.shape.rank, created.optimizer) == (LORA["rank"], True)
    assert created.checkpoint is not None
    again = {"model_id": model, "seq_id": 2, "path": path, "optimizer": False}
    accepted = await user.accepted("/load_weights", again)
    assert (await user.result(accepted["request_id"])).json()["path"] == path
    token = await user.post(
        "/load_weights", body | {"model_seq_id": 2, "weights_access_token": "x"}
    )
    assert token.status_code == 422
    assert token.json()["detail"].startswith("weights_access_token:")


async def test_what_no_model_can_be_is_refused_by_name(rig: Rig) -> None:
    """Training all weights, other optimizers, unknown bases, sessions and fields: each with its own sentence."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": LORA}
    for changes, status, sentence in (
        ({"lora_config": None}, 422, "lora_config: missing"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, 422, "optimizer: 'dimuon'"),
        ({"lora_config": LORA | {"rank": 1000}}, 422, "lora_config.rank: 1000, must be 1 to"),
        ({"base_model": "nobody/model"}, 404, "there is no base model 'nobody/model'"),
        ({"session_id": "ses_none"}, 404, "there is no open session 'ses_none'"),
        ({"model_seq_id": -1}, 422, "model_seq_id: -1"),
        ({"full_weight": True}, 422, "Object contains unknown field `full_weight`"),
    ):
        answer = await user.post("/create_model", body | changes)
        assert (answer.status_code, sentence in answer.json()["detail"]) == (status, True), (
            answer.text
        )
    assert not rig.trainer.messages


async def test_a_body_that_is_no_json_is_400_with_a_sentence(rig: Rig) -> None:
    """An empty 400 would make the client think of a proxy."""
    answer = await TinkerUser(rig.tenant).post("/create_model", content=b"{")
    assert answer.status_code == 400
    assert "not valid JSON" in msgspec.json.decode(answer.content)["detail"]


async def test_an_operation_that_is_asked_for_as_another_is_none(rig: Rig) -> None:
    """A request id that names an operation by another kind is 404, and no failure of ours."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    step = {"model_id": model, "seq_id": 1, "adam_params": {}}
    accepted = await user.accepted("/optim_step", step)
    other = accepted["request_id"].replace("optim_step", "save_weights")
    assert (await user.result(accepted["request_id"])).status_code == 200
    assert (await user.result(other)).status_code == 404


async def test_what_came_too_early_is_to_be_sent_again(rig: Rig) -> None:
    """An operation far ahead of those done is 429, and nothing is stored in its place."""
    user = TinkerUser(rig.tenant)
    model = await user.new_model()
    early = {"model_id": model, "seq_id": 10_000, "adam_params": {}}
    answer = await user.post("/optim_step", early)
    assert (answer.status_code, answer.json()["detail"][:7]) == (429, "seq_id:")
    assert await _stored(rig) == 1


async def test_a_sampling_session_of_another_model_fails_in_its_turn(rig: Rig) -> None:
    """Weights saved for a sampling session whose number is taken keep their place among the operations."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    model = await user.new_model(session)
    taken = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    await user.accepted("/create_sampling_session", taken)
    body = {"model_id": model, "sampling_session_seq_id": 0, "seq_id": 1}
    accepted = await user.accepted("/save_weights_for_sampler", body)
    failed = (await user.result(accepted["request_id"])).json()
    assert "is of another model already" in failed["error"]
