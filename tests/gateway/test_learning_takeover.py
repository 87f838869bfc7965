"""A gateway that dies while it trains a run: another goes on, and nothing is trained on twice or lost."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import nats.errors
import pytest
from support.gateway import Rig, eventually, running_rig
from support.learning import judged, point_alias, reached, started, state_of, steps_of, until
from support.stand_ins import BASE, TOKEN

from river_client.feedback_wire import ClaimFeedback
from river_gateway.feedback import learner, learning
from river_gateway.limits import LEARNING_LEASE_S
from river_ops.children import free_port
from river_ops.embedded.nats import EmbeddedNats
from river_trainer import journal, protocol

START_PATIENCE_S = 60.0
RUNS = 6
BATCHES = 3
TAKEOVER_PATIENCE_S = LEARNING_LEASE_S + 15.0
_EXPIRE = "update learning set leased_until = now() where run_id = $1"


@asynccontextmanager
async def _gateway_process(
    rig: Rig, postgres_url: str, nats_url: str
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Another gateway, as a process of its own."""
    environment = {
        **os.environ,
        "RIVER_NATS_URL": nats_url,
        "RIVER_POSTGRES_URL": postgres_url,
        "RIVER_ENGINE_TOKEN": TOKEN,
        "RIVER_PORT": str(free_port()),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "river_gateway.main", env=environment
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _stored(rig: Rig, run_id: str) -> int:
    """How many operations of a run the journal has stored, its making included."""
    subject = protocol.train_subject(BASE, run_id)
    info = await rig.nats.jetstream().stream_info(protocol.TRAIN_STREAM, subjects_filter=subject)
    return (info.state.subjects or {}).get(subject, 0)


async def test_kill_9_in_the_middle_of_a_step(
    rig: Rig, postgres_url: str, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the trainer works: the step is taken once, and the next batch is of the other completions."""
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 0)  # This gateway looks on at first.
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    rig.trainer.answering = False
    async with _gateway_process(rig, postgres_url, nats_url) as process:
        first = await judged(rig, 0.0, 1.0)
        await eventually(lambda: steps_of(rig, run.run_id), START_PATIENCE_S)
        process.kill()
        await process.wait()
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 8)
    second = await judged(rig, 1.0, 0.0)
    rig.trainer.answering = True
    await rig.trainer.answer(steps_of(rig, run.run_id)[0])
    state = await reached(
        rig, run.run_id, lambda state: state.steps == 2, patience_s=TAKEOVER_PATIENCE_S
    )
    assert (state.completions, state.status, state.next_seq) == (4, "learning", 3)
    assert [message.seq for message in steps_of(rig, run.run_id)] == [1, 2]
    assert await _stored(rig, run.run_id) == 3
    assert rig.trainer.steps[run.run_id] == 2
    connection = await asyncpg.connect(postgres_url)
    try:
        batches = await connection.fetch(
            "select array_agg(completion_id) as ids from feedback_use group by batch_id"
        )
    finally:
        await connection.close()
    assert {frozenset(row["ids"]) for row in batches} == {frozenset(first), frozenset(second)}


async def test_many_runs_and_a_gateway_killed_among_three(
    rig: Rig, postgres_url: str, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every completion of every run is in one step, whoever worked on it, and each run's seqs are without a gap."""
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 0)
    pool = rig.services.pool
    runs = [await rig.tenant.new_run() for _ in range(RUNS)]
    names = {run.run_id: f"tutor-{number}" for number, run in enumerate(runs)}
    leased = "select count(*) from learning where leased_until > now() having count(*) = $1"
    rig.trainer.answering = False
    async with (
        _gateway_process(rig, postgres_url, nats_url) as killed,
        _answering_slowly(rig),
    ):
        half = runs[: RUNS // 2]
        for run in half:
            await started(rig, run.run_id, alias=names[run.run_id])
        await until(lambda: pool.fetchval(leased, len(half)), START_PATIENCE_S)
        monkeypatch.setattr(learner, "LEARNINGS_MAX", RUNS)
        async with _gateway_process(rig, postgres_url, nats_url):
            for run in runs[RUNS // 2 :]:
                await started(rig, run.run_id, alias=names[run.run_id])
            await until(lambda: pool.fetchval(leased, RUNS), START_PATIENCE_S)
            for _ in range(BATCHES):
                for run in runs:
                    await judged(rig, 0.0, 1.0, model=names[run.run_id])
            await eventually(lambda: all(steps_of(rig, run.run_id) for run in half))
            killed.kill()
            for run in runs:
                state = await reached(
                    rig, run.run_id, lambda state: state.steps == BATCHES, TAKEOVER_PATIENCE_S
                )
                assert state.completions == 2 * BATCHES
                assert await _stored(rig, run.run_id) == 1 + BATCHES
                assert rig.trainer.steps[run.run_id] == BATCHES
    uses = await pool.fetch(
        "select consumer, count(*) as uses, count(distinct batch_id) as batches from feedback_use group by consumer"
    )
    assert {row["consumer"]: (row["uses"], row["batches"]) for row in uses} == {
        run.run_id: (2 * BATCHES, BATCHES) for run in runs
    }


@asynccontextmanager
async def _answering_slowly(rig: Rig) -> AsyncGenerator[None]:
    """Answers each operation once, a while after it came."""

    async def answer() -> None:
        answered = len(rig.trainer.messages)
        while True:
            await asyncio.sleep(0.5)
            come = rig.trainer.messages[answered:]
            answered += len(come)
            for message in come:
                await rig.trainer.answer(message)

    task = asyncio.create_task(answer())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("accepted", [False, True], ids=["claimed", "accepted"])
async def test_whatever_is_in_the_row_is_done_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, accepted: bool
) -> None:
    """A batch claimed by a gateway that died before, or after, its operation was stored is one step of its own seq."""
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 0)
    pool = rig.services.pool
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    completions = await judged(rig, 0.0, 1.0)
    assert await learning.lease(pool, "gwy_dead", 1) == [run.run_id]
    asked = ClaimFeedback(model="tutor", consumer=run.run_id, min_batch=2)
    taken = await learning.take_batch(pool, run.run_id, "gwy_dead", asked, 1)
    assert taken is not None
    assert taken.batch is not None
    if accepted:
        message = protocol.TrainMessage(
            run_id=run.run_id,
            seq=1,
            tenant_id=rig.tenant.tenant_id,
            key_id=rig.tenant.key_id,
            session_id=run.session_id,
            base_model=BASE,
            submitted_at=taken.batch.claimed_at.timestamp(),
            task=protocol.TrainStep(
                data=[],
                loss_fn="ppo",
                loss_config={},
                adam=protocol.Adam(
                    lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, grad_clip_norm=None
                ),
            ),
        )
        await journal.submit(rig.nats.jetstream(), message)
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 8)
    await pool.execute(_EXPIRE, run.run_id)
    state = await reached(rig, run.run_id, lambda state: state.steps == 1)
    assert (state.completions, state.next_seq) == (len(completions), 2)
    assert await _stored(rig, run.run_id) == 2
    assert len(steps_of(rig, run.run_id)) == 1
    # What the dead gateway would still write if it were only slow changes nothing.
    assert await learning.leased(pool, run.run_id, "gwy_dead") is None
    assert not await learning.settle(pool, run.run_id, "gwy_dead", taken.batch, completions=9)
    assert (await state_of(rig, run.run_id)).completions == len(completions)


async def test_what_was_deleted_after_it_was_claimed_is_not_trained_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it hold up what comes after it."""
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 0)
    pool = rig.services.pool
    await point_alias(rig)
    run = await rig.tenant.new_run()
    await started(rig, run.run_id, publish="none")
    completions = await judged(rig, 0.0, 1.0)
    await learning.lease(pool, "gwy_dead", 1)
    asked = ClaimFeedback(model="tutor", consumer=run.run_id, min_batch=2)
    assert await learning.take_batch(pool, run.run_id, "gwy_dead", asked, 1) is not None
    for completion in completions:
        await rig.tenant.openai.chat.completions.delete(completion)
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 8)
    await pool.execute(_EXPIRE, run.run_id)
    await judged(rig, 0.0, 1.0)
    state = await reached(rig, run.run_id, lambda state: state.steps == 1)
    assert (state.completions, state.next_seq) == (2, 2)
    assert len(steps_of(rig, run.run_id)) == 1


async def test_nats_away_in_the_middle_of_a_step(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """The gateway goes on with the same operation when NATS is back; it is not stored again."""
    async with running_rig(postgres_url, own_nats.url(), tmp_path) as rig:
        run = await rig.tenant.new_run()
        await started(rig, run.run_id)
        rig.trainer.answering = False
        await judged(rig, 0.0, 1.0)
        await eventually(lambda: steps_of(rig, run.run_id))
        own_nats.stop()
        await eventually(lambda: not rig.services.bus.connected)
        await asyncio.sleep(1.5)
        own_nats.start()
        await eventually(lambda: rig.services.bus.connected)
        await until(lambda: _answered(rig, run.run_id))
        state = await reached(rig, run.run_id, lambda state: state.steps == 1)
        assert (state.completions, state.next_seq) == (2, 2)
        assert await _stored(rig, run.run_id) == 2


async def _answered(rig: Rig, run_id: str) -> bool:
    """Whether the trainer has published the result of the step, whose connection comes back by itself."""
    try:
        await rig.trainer.answer(steps_of(rig, run_id)[0])
    except nats.errors.Error:
        return False
    return True


async def test_a_gateway_that_stops_leaves_its_runs_to_others(
    rig: Rig, postgres_url: str, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, without waiting for its leases to lapse."""
    monkeypatch.setattr(learner, "LEARNINGS_MAX", 0)
    run = await rig.tenant.new_run()
    await started(rig, run.run_id)
    pool = rig.services.pool
    leased = "select leased_by from learning where run_id = $1 and leased_until > now()"
    async with _gateway_process(rig, postgres_url, nats_url) as process:
        await until(lambda: pool.fetchval(leased, run.run_id), START_PATIENCE_S)
        process.terminate()
        assert await process.wait() == 0
    assert await pool.fetchval(leased, run.run_id) is None
