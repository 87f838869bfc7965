"""Operations: in order, once, whatever happens on the way."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.stub_gateway import FAILING_LOSS, KEY, REFUSED_LOSS, RUN_ID, Fault, StubGateway

import river_client as river
from river_client import limits, wire

DATA: list[dict[str, Any]] = [{"input_ids": [1, 2]}]
SUBMIT = r"POST /runs/.*/operations"


def test_operations_are_numbered_in_order(model: river.Model, gateway: StubGateway) -> None:
    """Each call is the next operation, with its arguments, and moves the policy version."""
    result = model.forward_backward(data=DATA, loss_fn="importance_sampling", clip=0.2)
    model.optim_step(lr=1e-3, grad_clip_norm=1.0)
    saved = model.save_weights("final", ttl=60)
    assert [type(gateway.operations[seq]) for seq in (1, 2, 3)] == [
        wire.ForwardBackward,
        wire.OptimStep,
        wire.SaveWeights,
    ]
    first = gateway.operations[1]
    assert isinstance(first, wire.ForwardBackward)
    assert first.loss_config == {"clip": 0.2}
    np.testing.assert_array_equal(result.logprobs[0], np.array([-1.0, -2.0], np.float32))
    assert result.metrics == {"loss": 0.5}
    assert model.policy_version == f"{RUN_ID}@1"
    assert saved.path == f"river://{RUN_ID}/weights/final"


def test_expert_routing_goes_back_as_it_came(model: river.Model, gateway: StubGateway) -> None:
    """A sample's routing is a datum's field, and every training call can ask for it to be replayed."""
    sample = model.sample("x", return_expert_routing=True)[0][0]
    assert model.sample("x")[0][0].expert_routing is None
    np.testing.assert_array_equal(sample.expert_routing, [[[4, 0]], [[3, 1]], [[0, 0]]])
    full_ids = sample.prompt_token_ids + sample.tokens
    data = [{"input_ids": full_ids, "expert_routing": sample.expert_routing}]
    model.forward(data)
    model.forward(data, force_routing_replay=True)
    model.forward_backward(data, force_routing_replay=True)
    model.train_step(data, lr=1e-3, force_routing_replay=True)
    model.submit_batch(data, lr=1e-3, force_routing_replay=True).result()
    operations: list[Any] = [gateway.operations[seq] for seq in range(1, 6)]
    assert [operation.force_routing_replay for operation in operations] == [False] + [True] * 4
    assert operations[-1].loss_config == {}
    for operation in operations:
        routing = operation.data[0].expert_routing
        assert (routing.dtype, routing.shape) == ("uint8", (3, 1, 2))
        assert routing.data == bytes([4, 0, 3, 1, 0, 0])


@pytest.mark.parametrize(
    "fault",
    [
        Fault(SUBMIT, times=2),
        Fault(SUBMIT, times=2, after_work=True),
        Fault(SUBMIT, times=2, status=502),
        Fault(SUBMIT, times=1, status=503, headers={"retry_after": "0.2"}),
        Fault(SUBMIT, times=1, status=429, headers={"retry_after": "0.2"}),
        Fault("GET /operations/.*", times=2),
        Fault("GET /operations/.*", times=2, status=504),
    ],
    ids=["lost", "answer lost", "502", "503", "429", "poll lost", "poll 504"],
)
def test_a_retry_is_the_same_operation(
    model: river.Model, gateway: StubGateway, fault: Fault
) -> None:
    """A submission whose request or answer is lost is repeated under its own number, never doubled."""
    gateway.faults = [fault]
    model.train_step(DATA, lr=1e-3)
    model.optim_step(lr=1e-3)
    assert fault.times == 0
    assert sorted(gateway.operations) == [1, 2]
    assert isinstance(gateway.operations[1], wire.TrainStep)
    assert gateway.repeated == ([1, 1] if fault.after_work else [])


@pytest.mark.parametrize("after_work", [False, True], ids=["request lost", "answer lost"])
def test_an_unanswered_operation_is_settled_first(gateway: StubGateway, after_work: bool) -> None:
    """When retrying gives up, the same call again is the same operation, and another call comes after it."""
    with (
        river.Client(api_key=KEY, base_url=gateway.base_url, retry_for_s=0.0) as client,
        client.session() as session,
    ):
        model = session.create_model("base")
        gateway.faults = [Fault(SUBMIT, after_work=after_work)]
        with pytest.raises(river.ConnectionError):
            model.train_step(DATA, lr=1e-3)
        model.train_step(DATA, lr=1e-3)
        assert sorted(gateway.operations) == [1]
        gateway.faults = [Fault(SUBMIT, after_work=after_work)]
        with pytest.raises(river.ConnectionError):
            model.train_step(DATA, lr=2e-3)
        model.optim_step(lr=3e-3)
    rates = [operation.adam.lr for operation in gateway.operations.values()]  # type: ignore[union-attr]
    assert rates == [1e-3, 2e-3, 3e-3]


def test_a_refused_operation_gives_its_number_back(
    model: river.Model, gateway: StubGateway
) -> None:
    """What is refused at the door names field and index, and leaves no gap."""
    with pytest.raises(river.InvalidRequestError) as refused:
        model.forward_backward(DATA, loss_fn=REFUSED_LOSS)
    assert refused.value.param == "data[1].input_ids[2]"
    assert (refused.value.field, refused.value.index) == ("data[1].input_ids", 2)
    assert refused.value.request_id == "req_1"
    model.forward_backward(DATA)
    assert sorted(gateway.operations) == [1]


@pytest.mark.parametrize("status", [500, 501])
def test_an_operation_that_the_server_fails_at_gives_its_number_back(
    model: river.Model, gateway: StubGateway, status: int
) -> None:
    """A clear failure is no acceptance: what comes next is not held up by a repetition of it."""
    gateway.faults = [Fault(SUBMIT, status=status)]
    with pytest.raises(river.ServerError):
        model.train_step(DATA, lr=1e-3)
    model.optim_step(lr=1e-3)
    assert [type(operation) for operation in gateway.operations.values()] == [wire.OptimStep]


@pytest.mark.parametrize("status", [401, 404, 500])
@pytest.mark.parametrize("retry_for_s", [0.0, 30.0], ids=["called again", "retried"])
def test_a_refused_retry_keeps_the_number(
    gateway: StubGateway, status: int, retry_for_s: float
) -> None:
    """What may have been accepted at first keeps its number, whatever becomes of its repetition."""
    with (
        river.Client(api_key=KEY, base_url=gateway.base_url, retry_for_s=retry_for_s) as client,
        client.session() as session,
    ):
        model = session.create_model("base")
        gateway.faults = [Fault(SUBMIT, after_work=True), Fault(SUBMIT, status=status)]
        if not retry_for_s:
            with pytest.raises(river.ConnectionError):
                model.train_step(DATA, lr=1e-3)
        with pytest.raises(river.RiverError) as refused:
            model.train_step(DATA, lr=1e-3)
        assert refused.value.status == status
        model.optim_step(lr=1e-3)
    assert [type(operation) for operation in gateway.operations.values()] == [
        wire.TrainStep,
        wire.OptimStep,
    ]
    assert gateway.repeated == [1]


def test_a_failed_operation_is_told(model: river.Model) -> None:
    """What fails in the trainer raises what went wrong there, every time it is asked for."""
    pending = model.submit_forward_backward(DATA, loss_fn=FAILING_LOSS)
    with pytest.raises(river.OperationFailedError, match="no room"):
        pending.result()
    with pytest.raises(river.OperationFailedError, match="no room") as failed:
        pending.result()
    assert failed.value.operation_id == f"{RUN_ID}-1"
    assert failed.value.type == "out_of_memory"
    assert pending.done()


def test_a_timeout_leaves_the_operation_retrievable(
    client: river.Client, model: river.Model, gateway: StubGateway
) -> None:
    """After a timeout the same operation can be waited for again, from its own object or by its id."""
    gateway.polls_until_done = 10**9
    pending = model.submit_batch(DATA, lr=1e-3)
    assert not pending.done()
    with pytest.raises(TimeoutError) as late:
        pending.result(timeout=0.05)
    assert isinstance(late.value, river.TimeoutError)
    assert late.value.operation_id is not None
    gateway.polls_until_done = 0
    assert pending.result().policy_version == f"{RUN_ID}@1"
    assert client.operation(late.value.operation_id).result(timeout=30).metrics == {"loss": 0.5}
    assert sorted(gateway.operations) == [1]


def test_long_polls_follow_each_other_until_done(model: river.Model, gateway: StubGateway) -> None:
    """A wait longer than one poll goes on polling."""
    gateway.polls_until_done = 5
    model.train_step(DATA, lr=1e-3)
    assert gateway.requests[f"GET /operations/{RUN_ID}-1"] == 6


def test_a_waiting_operation_says_what_for(
    model: river.Model, gateway: StubGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's reason is on the operation and, on a terminal, in the progress line; with the result it is gone."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(limits, "PROGRESS_DELAY_S", 0.0)
    monkeypatch.setattr(limits, "PROGRESS_INTERVAL_S", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    gateway.queue_state = river.QueueState(state="queued", reason="3 before it", ahead=3)
    gateway.polls_until_done = 10**9
    pending = model.submit_batch(DATA, lr=1e-3)
    assert pending.queue_state is None
    with pytest.raises(river.TimeoutError):
        pending.result(timeout=0.3)
    assert pending.queue_state == gateway.queue_state
    assert f"waiting for {RUN_ID}-1: 3 before it" in stderr.getvalue()
    gateway.polls_until_done = 0
    pending.result()
    assert pending.queue_state is None


def polled(gateway: StubGateway) -> set[int]:
    """The operations, but for the run's creation, that were asked about."""
    route = f"GET /operations/{RUN_ID}-"
    return {int(asked.removeprefix(route)) for asked in gateway.requests if route in asked} - {0}


def test_a_result_that_comes_soon_takes_one_request(
    model: river.Model, gateway: StubGateway
) -> None:
    """Submitting returns once the operation is accepted; the result comes with the rest of the same answer."""
    gateway.waits = "for result"
    pending = model.submit_batch(DATA, lr=1e-3)
    later = model.submit_batch(DATA, lr=1e-3)
    assert sorted(gateway.operations) == [1, 2]
    with pytest.raises(river.TimeoutError):
        pending.result(timeout=0.05)
    gateway.result_due.set()
    assert pending.result().metrics == {"loss": 0.5}
    assert later.result().policy_version == model.policy_version == f"{RUN_ID}@2"
    assert polled(gateway) == set()


def test_a_lost_rest_of_an_answer_is_asked_for(model: river.Model, gateway: StubGateway) -> None:
    """An answer that breaks off after its headers leaves the operation accepted; its result is polled."""
    gateway.waits = "in vain"
    assert model.train_step(DATA, lr=1e-3).policy_version == f"{RUN_ID}@1"
    assert sorted(gateway.operations) == [1]
    assert gateway.repeated == []
    assert gateway.requests[f"GET /operations/{RUN_ID}-1"] == 1


def test_only_so_many_submissions_hold_a_connection(
    model: river.Model, gateway: StubGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound nothing is waited for, so that submitting never runs out of connections."""
    monkeypatch.setattr(limits, "EARLY_ANSWERS_MAX", 2)
    gateway.waits = "for result"
    pending = [model.submit_batch(DATA, lr=1e-3) for _ in range(6)]
    gateway.result_due.set()
    assert len({one.result().policy_version for one in pending}) > 0
    assert polled(gateway) == {3, 4, 5, 6}


def test_threads_share_a_model(model: river.Model, gateway: StubGateway) -> None:
    """Submissions of many threads get numbers without gaps or repetitions, through lost answers too."""
    gateway.faults = [Fault(SUBMIT, times=3, after_work=True)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: model.submit_forward(DATA), range(40)))
    assert sorted(gateway.operations) == list(range(1, 41))
    assert len({pending.operation_id for pending in done}) == 40


def test_sessions_have_heartbeats_and_an_end(client: river.Client, gateway: StubGateway) -> None:
    """A session is kept alive while its block runs, even when nothing else is said, and then ended."""
    enough = threading.Event()
    with client.session() as session:
        route = f"POST /sessions/{session.session_id}/heartbeat"
        gateway.faults = [Fault(route)]
        for _ in range(600):
            if gateway.requests[route] >= 3 or enough.wait(0.05):
                break
        assert gateway.requests[route] >= 3
        assert gateway.sessions_ended == []
    assert gateway.sessions_ended == ["ses_1"]


async def test_the_async_twin_does_the_same(gateway: StubGateway) -> None:
    """The same names, awaited."""
    async with (
        river.AsyncClient(api_key=KEY, base_url=gateway.base_url) as client,
        client.session() as session,
    ):
        model = await session.create_model("base")
        pending = await model.submit_batch(DATA, lr=1e-3)
        assert (await pending.result(timeout=30)).policy_version == model.policy_version
        groups = await model.sample(["a", "b"], num_samples=2)
        assert [len(group) for group in groups] == [2, 2]
        pieces = [piece async for piece in client.chat_stream("hi", model=model.path)]
        assert pieces == ["a", "b", "c"]
        assert (await client.runs.list())[0].run_id == RUN_ID
