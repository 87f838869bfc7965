"""What the training API refuses, and how: by the field's path, and leaving everything usable."""

from __future__ import annotations

from typing import Any

import asyncpg
import msgspec
import pytest
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client import wire
from river_gateway.limits import BODY_MAX_BYTES

DATUM = wire.Datum(input_ids=[1, 2, 3])


def wrong_operations() -> list[Any]:
    forward: dict[str, Any] = {"kind": "forward", "data": [{"input_ids": [1, 2]}]}
    return [
        pytest.param({"seq": 0, "operation": forward}, "seq", id="seq"),
        pytest.param({"seq": "1", "operation": forward}, "seq", id="seq type"),
        pytest.param({"seq": 1}, "operation", id="missing"),
        pytest.param({"seq": 1, "operation": forward | {"loss_fn": "no"}}, "loss_fn", id="loss"),
        pytest.param(
            {"seq": 1, "operation": forward | {"loss_fn": "dro"}},
            "data[0].old_logprobs",
            id="what the loss needs",
        ),
        pytest.param(
            {"seq": 1, "operation": forward | {"loss_config": {"x": 1}}},
            "loss_config.x",
            id="config",
        ),
        pytest.param({"seq": 1, "operation": forward | {"data": []}}, "data", id="empty"),
        pytest.param(
            {"seq": 1, "operation": forward | {"data": [{"input_ids": [1, "2"]}]}},
            "data[0].input_ids[1]",
            id="type",
        ),
        pytest.param(
            {"seq": 1, "operation": {"kind": "save_weights", "name": "a/b"}}, "name", id="name"
        ),
        pytest.param(
            {"seq": 1, "operation": {"kind": "optim_step", "adam": {"lr": -1}}}, "adam.lr", id="lr"
        ),
    ]


@pytest.mark.parametrize(("body", "param"), wrong_operations())
async def test_wrong_operations(rig: Rig, body: Any, param: str) -> None:
    """A wrong operation is 422 by the field's path and leaves the run usable."""
    run = await rig.tenant.new_run()
    answer = await rig.tenant.post(f"/runs/{run.run_id}/operations", body)
    assert answer.status_code == 422
    assert error_of(answer).param == param
    assert error_of(answer).type == "invalid_request"
    accepted = await rig.tenant.submit(run.run_id, 1, wire.Forward(data=[DATUM]))
    assert accepted.status_code == 202


async def test_a_gap_of_operations_is_bounded(rig: Rig, postgres_url: str) -> None:
    """What is too far ahead of the newest operation done is 409 and stored nowhere; with progress the bound moves."""
    run = await rig.tenant.new_run()
    forward = wire.Forward(data=[DATUM])
    assert (await rig.tenant.submit(run.run_id, 1023, forward)).status_code == 202
    answer = await rig.tenant.submit(run.run_id, 1024, forward)
    assert answer.status_code == 409
    assert error_of(answer).param == "seq"
    assert "at most 1024" in error_of(answer).message
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("update run set last_seq = 0")
    finally:
        await connection.close()
    assert (await rig.tenant.submit(run.run_id, 1024, forward)).status_code == 202


async def test_texts_that_cannot_be_stored(rig: Rig) -> None:
    """A NUL, which Postgres has no room for, is refused by the field's name; in a URL, refused at all."""
    run = await rig.tenant.new_run()
    operations, load = f"/runs/{run.run_id}/operations", {"kind": "load_weights", "path": "a\0"}
    cases: list[tuple[str, Any, str]] = [
        ("/sessions", {"tags": {"a": "b\0"}}, "tags.a"),
        ("/sessions", {"tags": {"a\0": "b"}}, "tags"),
        ("/runs", {"session_id": "\0", "base_model": BASE}, "session_id"),
        ("/runs", {"session_id": run.session_id, "base_model": "\0"}, "base_model"),
        (f"/runs/{run.run_id}/metrics", {"metrics": {"a\0": 1.0}}, "metrics"),
        (operations, {"seq": 1, "operation": load}, "path"),
        ("/sample", {"model": "a\0", "prompts": ["x"]}, "model"),
    ]
    for route, body, param in cases:
        answer = await rig.tenant.post(route, body)
        assert (answer.status_code, error_of(answer).param) == (422, param)
    for route in ("/runs/%00", "/checkpoints?path=river://a/weights/%00"):
        assert (await rig.tenant.http.get(f"/river/v1{route}")).status_code == 422
    prompt = wire.SampleRequest(model=BASE, prompts=["a\0"], max_tokens=4)
    assert (await rig.tenant.post("/sample", prompt)).status_code == 200


async def test_bodies_that_are_none(rig: Rig) -> None:
    """What is not JSON is 400, what is not there 400, what is too large 413, an unknown route 404: all in shape."""
    answers = {
        400: [
            await rig.tenant.post("/sessions", b"{"),
            await rig.tenant.post("/sessions", b"\xff"),
        ],
        413: [await rig.tenant.post("/sessions", b" " * (BODY_MAX_BYTES + 1))],
        404: [await rig.tenant.get("/nowhere")],
        405: [await rig.tenant.http.put("/river/v1/runs", json={})],
    }
    for status, given in answers.items():
        for answer in given:
            assert answer.status_code == status
            assert error_of(answer).request_id == answer.headers["x-request-id"]
    empty = await rig.tenant.post("/sessions", b"")
    assert empty.status_code in (400, 422)
    assert error_of(empty).message


async def test_wrong_runs(rig: Rig) -> None:
    """A run needs an open session, a known base model and a rank that fits trainer and engines."""
    session = (await rig.tenant.post("/sessions", wire.CreateSession())).json()["session_id"]
    asked = wire.CreateRun(session_id=session, base_model=BASE)
    cases: list[tuple[wire.CreateRun, int, str]] = [
        (msgspec.structs.replace(asked, base_model="no/such"), 404, "base_model"),
        (msgspec.structs.replace(asked, lora=wire.LoraConfig(rank=17)), 422, "lora.rank"),
        (msgspec.structs.replace(asked, lora=wire.LoraConfig(rank=0)), 422, "lora.rank"),
        (
            msgspec.structs.replace(asked, lora=wire.LoraConfig(train_attn=False, train_mlp=False)),
            422,
            "lora",
        ),
        (msgspec.structs.replace(asked, session_id="ses_0"), 404, "session_id"),
        (msgspec.structs.replace(asked, checkpoint="river://run_0/weights/x"), 404, "path"),
    ]
    for body, status, param in cases:
        answer = await rig.tenant.post("/runs", body)
        assert (answer.status_code, error_of(answer).param) == (status, param)
    assert (await rig.tenant.post(f"/sessions/{session}/heartbeat", b"")).status_code == 204
    assert (await rig.tenant.http.delete(f"/river/v1/sessions/{session}")).status_code == 204
    assert (await rig.tenant.post(f"/sessions/{session}/heartbeat", b"")).status_code == 404
    assert (await rig.tenant.post("/runs", asked)).status_code == 404
