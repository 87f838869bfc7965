"""Runs that the gateway trains on feedback: what is trained on, once; who may train meanwhile; and why it ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.gateway import Rig, error_of, eventually
from support.learning import (
    ALIAS,
    judged,
    point_alias,
    reached,
    start,
    started,
    steps_of,
    stop,
    until,
)
from support.stand_ins import BASE

from river_billing.events import UsageKind
from river_billing.prices import seed_prices, set_price
from river_client import wire
from river_client.cli import river as command
from river_gateway.feedback import learning
from river_gateway.feedback.keeping import ChoiceTokens, Tokens
from river_trainer import journal, protocol

FORWARD = wire.Forward(data=[wire.Datum(input_ids=[1, 2])])


async def test_a_run_learns_and_its_alias_follows(rig: Rig) -> None:
    """Each batch is one step with the rewards less their mean, trained on once, and what was learnt is served."""
    await point_alias(rig)
    run = await rig.tenant.new_run()
    begun = await started(rig, run.run_id, loss_fn="ppo", loss_config={"clip_high": 1.5})
    assert (begun.status, begun.steps, begun.next_seq) == ("learning", 0, 1)
    alias = (await rig.tenant.get(f"/aliases/{ALIAS}")).json()
    assert alias["target"] == f"river://{run.run_id}"
    await judged(rig, 0.0, 1.0)
    await reached(rig, run.run_id, lambda state: state.steps == 1)
    await judged(rig, 3.0, 1.0, 0.0)
    state = await reached(rig, run.run_id, lambda state: state.steps == 2)
    assert (state.completions, state.next_seq) == (4, 3)
    assert state.policy_version == f"{run.run_id}@2"
    assert state.metrics == {"loss_sum": 1.5}
    first, second = steps_of(rig, run.run_id)
    assert (first.seq, second.seq) == (1, 2)
    assert isinstance(first.task, protocol.TrainStep)
    assert (first.task.loss_fn, first.task.loss_config["clip_high"]) == ("ppo", 1.5)
    assert first.task.adam.lr == 0.01
    advantages = [np.frombuffer(one.advantages or b"", "<f4") for one in first.task.data]
    assert sorted(list(values[values != 0]) for values in advantages) == [[-0.5], [0.5]]
    answer = await rig.tenant.openai.chat.completions.with_raw_response.create(
        model=ALIAS, messages=[{"role": "user", "content": "x"}]
    )
    assert answer.headers["x-river-policy-version"] == f"{run.run_id}@2"
    stopped = await stop(rig, run.run_id)
    assert (stopped.status, stopped.completions) == ("stopped", 4)
    listed = (await rig.tenant.get("/learning")).json()["learning"]
    assert [one["status"] for one in listed] == ["stopped"]
    # The third of the second three was too little for a batch, and waits for the next learning.
    await started(rig, run.run_id)
    await judged(rig, 7.0)
    assert (await reached(rig, run.run_id, lambda state: state.steps == 1)).next_seq == 4


async def test_an_alias_may_stay_as_it_is(rig: Rig) -> None:
    """Without publishing, a run learns from what others are answered."""
    await point_alias(rig)
    run = await rig.tenant.new_run()
    await started(rig, run.run_id, publish="none")
    await judged(rig, 0.0, 1.0)
    await reached(rig, run.run_id, lambda state: state.steps == 1)
    assert (await rig.tenant.get(f"/aliases/{ALIAS}")).json()["target"] == BASE


async def test_what_teaches_nothing_is_no_step(rig: Rig) -> None:
    """Of equal rewards there is nothing to learn: they are used, and the run stays as it is."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    await judged(rig, 1.0, 1.0)
    state = await reached(rig, run.run_id, lambda state: state.completions == 2)
    assert (state.steps, state.next_seq) == (0, 1)
    await judged(rig, 0.0, 1.0)
    assert (await reached(rig, run.run_id, lambda state: state.steps == 1)).completions == 4
    assert len(steps_of(rig, run.run_id)) == 1


async def test_what_can_never_be_trained_on_is_left_out(rig: Rig) -> None:
    """A reward from before there was a limit, and a sequence of one token: the rest of the batch is trained on."""
    run = await rig.tenant.new_run()
    huge, short, *_rest = await judged(rig, 0.0, 0.0, 0.0, 1.0, model=BASE)
    pool = rig.services.pool
    await pool.execute("update feedback set reward = 1e300 where completion_id = $1", huge)
    one_token = msgspec.msgpack.encode(Tokens(prompt=[], choices=[ChoiceTokens(0, [1], [-0.1])]))
    await pool.execute(
        "update stored_completion set tokens = $2 where completion_id = $1", short, one_token
    )
    await pool.execute("update stored_completion set model = $1", ALIAS)
    await started(rig, run.run_id, min_batch=4, max_batch=4)
    state = await reached(rig, run.run_id, lambda state: state.completions == 4)
    assert (state.status, state.steps) == ("learning", 1)
    (step,) = steps_of(rig, run.run_id)
    assert isinstance(step.task, protocol.TrainStep)
    assert len(step.task.data) == 2


async def test_nobody_else_trains_a_run_that_learns(rig: Rig) -> None:
    """Operations are refused meanwhile, but for one from before sent again; its seqs are nobody's afterwards either."""
    run = await rig.tenant.new_run()
    assert (await rig.tenant.submit(run.run_id, 1, FORWARD)).status_code == 202
    assert (await started(rig, run.run_id)).first_seq == 2
    refused = await rig.tenant.submit(run.run_id, 2, FORWARD)
    assert refused.status_code == 409
    assert f"learning from '{ALIAS}'" in error_of(refused).message
    assert (await rig.tenant.submit(run.run_id, 1, FORWARD)).status_code == 202
    await judged(rig, 0.0, 1.0)
    await reached(rig, run.run_id, lambda state: state.steps == 1)
    await stop(rig, run.run_id)
    used = await rig.tenant.submit(run.run_id, 2, FORWARD)
    assert (used.status_code, error_of(used).param) == (409, "seq")
    assert (await rig.tenant.submit(run.run_id, 3, FORWARD)).status_code == 202
    assert (await rig.tenant.result(f"{run.run_id}-3")).status == "done"


async def test_an_operation_that_came_in_between_is_not_taken_for_ours(rig: Rig) -> None:
    """One that another gateway accepted just before it knew keeps its seq; the batch takes the next."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    await journal.submit(rig.nats.jetstream(), _foreign(rig, run))
    await judged(rig, 0.0, 1.0)
    state = await reached(rig, run.run_id, lambda state: state.steps == 1)
    assert state.next_seq == 3
    assert steps_of(rig, run.run_id)[-1].seq == 2


async def test_nor_is_one_that_is_done_and_out_of_the_journal(rig: Rig) -> None:
    """Its result is not taken for the batch's, which would be used up untrained."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    jetstream = rig.nats.jetstream()
    ack = await journal.submit(jetstream, _foreign(rig, run))
    operation = protocol.operation_id(run.run_id, 1)
    await until(lambda: journal.find_result(jetstream, operation))
    await jetstream.delete_msg(protocol.TRAIN_STREAM, ack.seq)
    await judged(rig, 0.0, 1.0)
    state = await reached(rig, run.run_id, lambda state: state.completions == 2)
    assert (state.steps, state.next_seq) == (1, 3)
    assert [step.seq for step in steps_of(rig, run.run_id)] == [2]


def _foreign(rig: Rig, run: wire.Run) -> protocol.TrainMessage:
    """Operation 1 of a run, which is not the gateway's own."""
    return protocol.TrainMessage(
        run_id=run.run_id,
        seq=1,
        tenant_id=rig.tenant.tenant_id,
        key_id=rig.tenant.key_id,
        session_id=run.session_id,
        base_model=BASE,
        submitted_at=time.time(),
        task=protocol.Forward(data=[], loss_fn="cross_entropy", loss_config={}),
    )


async def test_who_comes_too_late_is_told(rig: Rig) -> None:
    """A gateway that has not heard yet that a run learns does not take the run's own step for a client's operation."""
    run = await rig.tenant.new_run()
    settings = (await started(rig, run.run_id)).settings
    await stop(rig, run.run_id)
    assert (await rig.tenant.submit(run.run_id, 1, FORWARD)).status_code == 202
    await learning.start(
        rig.services.pool,
        run_id=run.run_id,
        tenant_id=rig.tenant.tenant_id,
        key_id=rig.tenant.key_id,
        settings=settings,
        seq=2,
        step=0,
    )
    rig.services.learning_wake.set()
    await judged(rig, 0.0, 1.0)
    await eventually(lambda: steps_of(rig, run.run_id))
    late = await rig.tenant.submit(run.run_id, 2, FORWARD)
    assert late.status_code == 409
    assert "learning from" in error_of(late).message
    assert (await rig.tenant.submit(run.run_id, 1, FORWARD)).status_code == 202


async def test_stopping_waits_for_the_batch_at_hand(rig: Rig) -> None:
    """What has been submitted is applied; only then is the run its tenant's again."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    rig.trainer.answering = False
    await judged(rig, 0.0, 1.0)
    await eventually(lambda: steps_of(rig, run.run_id))
    assert (await stop(rig, run.run_id)).status == "stopping"
    assert (await start(rig, run.run_id)).status_code == 409
    await rig.trainer.answer(steps_of(rig, run.run_id)[0])
    state = await reached(rig, run.run_id, lambda state: state.status == "stopped")
    assert (state.steps, state.next_seq) == (1, 2)
    rig.trainer.answering = True
    assert (await rig.tenant.submit(run.run_id, 2, FORWARD)).status_code == 202


async def test_starting_again_is_the_same(rig: Rig) -> None:
    """A repeated request is none too many; other settings are a conflict until it is stopped."""
    run = await rig.tenant.new_run()
    assert await started(rig, run.run_id) == await started(rig, run.run_id)
    other = await start(rig, run.run_id, min_batch=1)
    assert other.status_code == 409
    assert "stop that first" in error_of(other).message
    await stop(rig, run.run_id)
    assert (await started(rig, run.run_id, min_batch=1)).settings.min_batch == 1


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"min_batch": 0}, 422, "min_batch"),
        ({"max_batch": 1}, 422, "min_batch"),
        ({"adam": {"lr": -1.0}}, 422, "adam.lr"),
        ({"loss_fn": "cross_entropy"}, 422, "loss_fn"),
        ({"loss_config": {"clip_high": 2.0}}, 422, "loss_config.clip_high"),
        ({"alias": "no name"}, 422, "alias"),
        ({"alias": BASE}, 422, "alias"),
        ({"alias": "nobody", "publish": "none"}, 404, "alias"),
    ],
    ids=["none", "crossed", "rate", "loss", "config", "name", "base", "unknown"],
)
async def test_wrong_settings(rig: Rig, changes: dict[str, Any], status: int, param: str) -> None:
    """What cannot be learnt is refused by name, and nothing has begun."""
    run = await rig.tenant.new_run()
    answer = await start(rig, run.run_id, **changes)
    assert (answer.status_code, error_of(answer).param) == (status, param)
    assert (await rig.tenant.get(f"/runs/{run.run_id}/learning")).status_code == 404


# ---- Why it ends -----------------------------------------------------------------------------------------------------


_FAILED = "select * from learning where status = 'failed'"


async def _delete_alias(rig: Rig, _: asyncpg.Connection) -> None:
    assert (await rig.tenant.http.delete(f"/river/v1/aliases/{ALIAS}")).status_code == 204


async def _revoke_key(rig: Rig, connection: asyncpg.Connection) -> None:
    await connection.execute(
        "update api_key set revoked_at = now() where key_id = $1", rig.tenant.key_id
    )


async def _end_credit(rig: Rig, connection: asyncpg.Connection) -> None:
    await seed_prices(connection)
    await set_price(
        connection,
        model=BASE,
        context_length=64,
        kind=UsageKind.TRAINING,
        nano_usd_per_unit=10_000,  # type: ignore[arg-type]
    )
    await connection.execute(
        "update api_key set monthly_budget_nano_usd = 1 where key_id = $1", rig.tenant.key_id
    )


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (_delete_alias, "the alias 'tutor' is gone"),
        (_revoke_key, "the API key is not valid"),
        (_end_credit, "budget"),
    ],
    ids=["alias", "key", "credit"],
)
async def test_it_ends_with_a_reason(
    rig: Rig,
    postgres_url: str,
    cause: Callable[[Rig, asyncpg.Connection], Awaitable[None]],
    reason: str,
) -> None:
    """What is wrong for good is said in the list; the completions are handed out again."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    await judged(rig, 0.0)
    connection = await asyncpg.connect(postgres_url)
    try:
        await cause(rig, connection)
        await connection.execute(
            "insert into stored_completion select completion_id || '-2', tenant_id, created_at, expires_at, model,"
            " base_model, policy_version, asked, answer, metadata, tokens, kind from stored_completion"
        )
        await connection.execute(
            "insert into feedback select completion_id, 0, tenant_id, 1 from stored_completion"
            " on conflict do nothing"
        )
        row = await until(lambda: connection.fetchrow(_FAILED))
        assert reason in row["reason"]
        assert (row["steps"], row["completions"], row["next_seq"]) == (0, 0, 1)
        assert await connection.fetchval("select count(*) from feedback_use") == 0
    finally:
        await connection.close()
    assert steps_of(rig, run.run_id) == []


async def test_a_step_that_the_trainer_cannot_do_ends_it(rig: Rig) -> None:
    """The trainer's own words are the reason, and the seq is used."""
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    rig.trainer.answering = False
    await judged(rig, 0.0, 1.0)
    await eventually(lambda: steps_of(rig, run.run_id))
    error = protocol.TaskError(type="run_lost", message="its snapshot is gone")
    await rig.trainer.answer(steps_of(rig, run.run_id)[0], error=error)
    state = await reached(rig, run.run_id, lambda state: state.status == "failed")
    assert state.reason == "the trainer could not do a step: its snapshot is gone"
    assert (state.steps, state.next_seq) == (0, 2)
    rig.trainer.answering = True
    assert (await rig.tenant.submit(run.run_id, 2, FORWARD)).status_code == 202


async def test_what_nobody_thought_of_ends_one_learning_only(rig: Rig) -> None:
    """Tokens that cannot be read end the learning of their run, with a reason; the gateway and other runs go on."""
    run, other = await rig.tenant.new_run(), await rig.tenant.new_run()
    await started(rig, other.run_id, alias="another")
    await judged(rig, 0.0, 1.0, model=BASE)
    await rig.services.pool.execute(
        "update stored_completion set tokens = $1, model = $2", b"\xc1", ALIAS
    )
    await started(rig, run.run_id)
    state = await reached(rig, run.run_id, lambda state: state.status == "failed")
    assert "internal error" in (state.reason or "")
    assert (state.steps, state.next_seq) == (0, 1)
    await judged(rig, 0.0, 1.0, model="another")
    await reached(rig, other.run_id, lambda state: state.steps == 1)
    # What could not be read is not handed out again.
    await started(rig, run.run_id)
    await judged(rig, 0.0, 1.0)
    assert (await reached(rig, run.run_id, lambda state: state.steps == 1)).next_seq == 2


async def test_a_tenant_has_so_many_runs_that_learn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than the limit is refused, with the limit; the same again is not, and one that is stopped makes room."""
    monkeypatch.setattr(learning, "LEARNINGS_PER_TENANT_MAX", 1)
    first, second = await rig.tenant.new_run(), await rig.tenant.new_run()
    await started(rig, first.run_id)
    refused = await start(rig, second.run_id, alias="another")
    assert (refused.status_code, error_of(refused).param) == (409, "run_id")
    assert "at most 1 of a tenant" in error_of(refused).message
    assert (await rig.tenant.get("/aliases/another")).status_code == 404
    await started(rig, first.run_id)
    await stop(rig, first.run_id)
    await started(rig, second.run_id, alias="another")


async def test_the_command(rig: Rig) -> None:
    """`river learning` starts, lists, shows and stops."""
    run = await rig.tenant.new_run()

    async def call(*arguments: str) -> Result:
        environment = {"RIVER_API_KEY": rig.tenant.secret, "RIVER_BASE_URL": rig.url}
        words = ["learning", *arguments]
        return await asyncio.to_thread(CliRunner(env=environment).invoke, command, words)

    assert (await call("list")).output == "No run learns.\n"
    begun = await call("start", run.run_id, ALIAS, "--lr", "0.1", "--min-batch", "2")
    assert (
        begun.output == f"{run.run_id}, learning, from {ALIAS}: 0 steps on 0 completions so far\n"
    )
    (listed,) = json.loads((await call("list", "--json")).output)
    assert (listed["run_id"], listed["settings"]["min_batch"]) == (run.run_id, 2)
    assert "learning" in (await call("list")).output
    assert "stopped" in (await call("stop", run.run_id)).output
    assert "stopped" in (await call("show", run.run_id)).output
