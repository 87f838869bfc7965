"""How results reach clients: heard as they are published, kept for who comes later, looked up when they were missed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from support.gateway import Rig, eventually
from support.stand_ins import BASE

from river_client import wire
from river_gateway import limits
from river_gateway.training import results as results_module
from river_gateway.training.results import Results
from river_trainer import journal, protocol

FORWARD = wire.Forward(data=[wire.Datum(input_ids=[1, 2, 3])])


def result(operation: str, step: int = 1) -> protocol.TrainResult:
    run_id, _, seq = operation.rpartition("-")
    return protocol.TrainResult(operation_id=operation, run_id=run_id, seq=int(seq), step=step)


async def publish(client: Client, *results: protocol.TrainResult) -> None:
    for one in results:
        await journal.publish_result(client.jetstream(), one)


async def test_what_was_heard_is_at_hand(rig: Rig) -> None:
    """A result that came before anybody asked needs no look into JetStream; a newer one replaces it."""
    await publish(rig.nats, result("run_a-1"), result("run_a-1", step=2))
    await rig.nats.jetstream().purge_stream(protocol.RESULTS_STREAM)
    found = await rig.services.results.result("run_a-1", 5.0)
    assert found == result("run_a-1", step=2)


async def test_what_was_not_heard_is_looked_up(rig: Rig) -> None:
    """A result published before this gateway began to listen is there at once."""
    await publish(rig.nats, result("run_b-1"))
    latecomer = Results(rig.services.bus)
    assert await latecomer.result("run_b-1", 0.0) == result("run_b-1")


async def test_what_was_missed_is_found_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation accepted here whose result the subscription missed is answered by the next look."""
    monkeypatch.setattr(results_module, "LOOK_AGAIN_S", 0.05)
    deaf = Results(rig.services.bus)
    deaf.watch("run_c-1")
    polling = asyncio.create_task(deaf.result("run_c-1", 5.0))
    await publish(rig.nats, result("run_c-1"))
    assert await polling == result("run_c-1")


async def test_a_lost_connection_makes_it_ask(rig: Rig) -> None:
    """What was accepted before a loss of the connection may have been missed, so it is looked up at once."""
    deaf = Results(rig.services.bus)
    deaf.watch("run_d-1")
    await publish(rig.nats, result("run_d-1"))
    assert await deaf.result("run_d-1", 0.0) is None
    rig.services.bus.losses += 1
    assert await deaf.result("run_d-1", 0.0) == result("run_d-1")


async def test_many_wait_for_one_result(rig: Rig) -> None:
    """Everybody who polls the same operation is answered by the one message."""
    polls = [asyncio.create_task(rig.services.results.result("run_e-1", 5.0)) for _ in range(20)]
    await asyncio.sleep(0.05)
    await publish(rig.nats, result("run_e-1"))
    assert await asyncio.gather(*polls) == [result("run_e-1")] * 20
    assert await rig.services.results.result("run_e-2", 0.01) is None


async def test_only_so_much_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest results make room, by number and by bytes; JetStream still has them."""
    monkeypatch.setattr(results_module, "RESULTS_KEPT_MAX", 3)
    hub = rig.services.results
    await publish(rig.nats, *(result(f"run_f-{seq}") for seq in range(5)))
    await eventually(lambda: f"run_f-{4}" in hub._kept)
    assert list(hub._kept) == [f"run_f-{seq}" for seq in (2, 3, 4)]
    monkeypatch.setattr(results_module, "RESULTS_KEPT_MAX_BYTES", 10)
    await publish(rig.nats, result("run_f-5"))
    await eventually(lambda: not hub._kept)
    assert hub._kept_bytes == 0
    assert await hub.result("run_f-0", 0.0) == result("run_f-0")


async def test_a_pending_answer_says_what_for(rig: Rig) -> None:
    """A poll that ends without a result carries the trainer's account, or says that none answers."""
    run = await rig.tenant.new_run()
    rig.trainer.answering = False
    await rig.tenant.submit(run.run_id, 1, FORWARD)
    operation = f"{run.run_id}-1"
    started = time.monotonic()
    alone = await rig.tenant.result(operation, timeout_s=0.05)
    assert time.monotonic() - started < 0.05 + limits.QUEUE_STATE_TIMEOUT_S + 1.0
    assert alone.queue is not None
    assert (alone.status, alone.queue.state) == ("pending", "no_trainer")
    assert "kept safe" in alone.queue.reason

    async def tell(message: Any) -> None:
        asked.append(message.data.decode())
        state = protocol.QueueState(state="queued", reason="2 operations come first", ahead=2)
        await message.respond(msgspec.msgpack.encode(state))

    asked: list[str] = []
    await rig.nats.subscribe(protocol.queue_subject(BASE), cb=tell)
    await rig.nats.flush()
    told = await rig.tenant.result(operation, timeout_s=0.05)
    assert asked == [operation]
    assert told.queue == wire.QueueState(state="queued", reason="2 operations come first", ahead=2)


@pytest.mark.parametrize("kind", ["json", "msgpack"])
async def test_a_client_may_wait_where_it_submits(rig: Rig, kind: str) -> None:
    """With `Prefer: wait` the headers say at once that it is accepted, and the body carries the result."""
    run = await rig.tenant.new_run()
    rig.trainer.answering = False
    encode, decode = {
        "json": (msgspec.json.encode, msgspec.json.decode),
        "msgpack": (msgspec.msgpack.encode, msgspec.msgpack.decode),
    }[kind]
    request = rig.tenant.http.build_request(
        "POST",
        f"/river/v1/runs/{run.run_id}/operations",
        content=encode(wire.SubmitOperation(seq=1, operation=FORWARD)),
        headers={
            "content-type": f"application/{kind}",
            "accept": f"application/{kind}",
            "prefer": "respond-async, wait=30",
        },
    )
    answer = await rig.tenant.http.send(request, stream=True)
    assert answer.status_code == 202
    operation = f"{run.run_id}-1"
    assert answer.headers["location"] == f"/river/v1/operations/{operation}"
    assert answer.headers["content-type"].startswith(f"application/{kind}")
    await eventually(lambda: len(rig.trainer.messages) == 2)
    await rig.trainer.answer(rig.trainer.messages[-1])
    accepted = decode(await answer.aread(), type=wire.OperationAccepted)
    assert accepted.operation_id == operation
    assert accepted.result == await rig.tenant.result(operation)


@pytest.mark.parametrize(
    ("prefer", "is_awaited"),
    [("wait=1", True), ("wait=1;x", True), ("wait=0", False), ("wait=soon", False), ("x", False)],
)
async def test_a_wait_in_vain(rig: Rig, prefer: str, is_awaited: bool) -> None:
    """When the time is over the body says why there is no result; what is no wait is none."""
    run = await rig.tenant.new_run()
    rig.trainer.answering = False
    submitted = wire.SubmitOperation(seq=1, operation=FORWARD)
    answer = await rig.tenant.post(
        f"/runs/{run.run_id}/operations", submitted, headers={"prefer": prefer}
    )
    accepted = msgspec.json.decode(answer.content, type=wire.OperationAccepted)
    assert accepted.operation_id == f"{run.run_id}-1"
    assert (accepted.result is not None) == is_awaited
    if accepted.result is not None:
        assert accepted.result.queue is not None
        assert (accepted.result.status, accepted.result.queue.state) == ("pending", "no_trainer")


async def test_a_known_run_outlives_postgres(rig: Rig) -> None:
    """Operations of a run seen before are taken, and answered, while Postgres is away."""
    run = await rig.tenant.new_run()
    await rig.tenant.submit(run.run_id, 1, FORWARD)
    assert (await rig.tenant.result(f"{run.run_id}-1")).status == "done"
    await rig.services.pool.close()
    assert (await rig.tenant.submit(run.run_id, 2, FORWARD)).status_code == 202
    assert (await rig.tenant.result(f"{run.run_id}-2")).status == "done"
    answer = await rig.tenant.http.get(f"/river/v1/runs/{run.run_id}")
    assert answer.status_code == 503


async def test_a_remembered_run_is_not_a_strangers(rig: Rig) -> None:
    """That its owner's run is remembered opens it to nobody else."""
    run = await rig.tenant.new_run()
    await rig.tenant.submit(run.run_id, 1, FORWARD)
    assert (await rig.stranger.submit(run.run_id, 1, FORWARD)).status_code == 404
    answer = await rig.stranger.http.get(f"/river/v1/operations/{run.run_id}-1?timeout_s=0")
    assert answer.status_code == 404
