"""What a trainer says of how it is, and what it does when an admin tells it to."""

# What is waited for happens in another process or task, and only NATS tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from nats.js.errors import NoKeysError
from support.trainer_world import WAIT_S, World
from support.training import training_script

from river_engine.protocol import Control, Controlled
from river_trainer import journal
from river_trainer.limits import PACE_WINDOW_S
from river_trainer.main import EXIT_AGAIN
from river_trainer.pace import Pace, Totals
from river_trainer.pass_times import PassTimes, moment
from river_trainer.protocol import (
    PHASES,
    TrainerRecord,
    operation_id,
    queue_subject,
    trainer_control_subject,
)


def test_the_pace_is_that_of_the_last_seconds() -> None:
    """What was counted before the window does not count, and a window without work has none."""
    totals, now = Totals(), 0.0
    pace = Pace(totals, clock=lambda: now)
    for _ in range(60):
        now += 1.0
        totals.steps += 2
        totals.tokens += 100
        totals.seconds["forward"] = totals.seconds.get("forward", 0.0) + 0.25
        pace.look()
    window_s, lately = pace.look()
    assert window_s == PACE_WINDOW_S
    assert (lately.steps, lately.tokens) == (60, 3000)
    assert lately.seconds == {"forward": 7.5}
    now += PACE_WINDOW_S
    assert pace.look()[1].steps == 0


def test_halves_of_passes_add_up() -> None:
    """Both halves of several passes are summed over lanes, and taken once."""
    times = PassTimes()
    times.add([(1.0, 1.5, 3.5), (2.0, 2.5, 4.5)])
    halves = times.take()
    assert (halves.forward_s, halves.backward_s, halves.backward_share) == (1.0, 4.0, 0.8)
    assert times.take().backward_share == 0.0
    begun = moment(torch.device("cpu"))
    end = moment(torch.device("cpu"))
    times.add([(begun, end, end)])
    assert times.take().backward_share == 0.0


async def _record(world: World) -> TrainerRecord | None:
    """The one record of a trainer of this world's base."""
    bucket = await journal.trainers_bucket(world.js)
    try:
        keys = await bucket.keys()
    except NoKeysError:
        return None
    for key in keys:
        entry = await bucket.get(key)
        record = msgspec.msgpack.decode(entry.value or b"", type=TrainerRecord)
        if record.base_model == world.base_name:
            return record
    return None


async def _told(world: World, trainer_id: str, action: str) -> Controlled:
    control = msgspec.msgpack.encode(Control(action=action))  # type: ignore[arg-type]
    answer = await world.client.request(trainer_control_subject(trainer_id), control, timeout=5)
    return msgspec.msgpack.decode(answer.data, type=Controlled)


async def test_a_trainer_says_where_its_time_goes(world: World) -> None:
    """Its record has steps, tokens and all phases of what it did, runs by place, and what it has warned of."""
    script = training_script("run_pace", steps=3, base_model=world.base_name)
    async with world.trainer(), asyncio.timeout(WAIT_S):
        await world.submit(*script.messages)
        await world.results(script)
        logging.getLogger("river.trainer").warning("a test's warning", extra={"run": "run_pace"})
        while (record := await _record(world)) is None or record.health.steps < 3:
            await asyncio.sleep(0.1)
        health = record.health
        assert set(health.phase_s) == set(PHASES)
        assert all(health.phase_s[phase] > 0.0 for phase in PHASES)
        assert health.phase_s["backward"] > 0.1 * health.phase_s["forward"]
        assert health.tokens > 0
        assert health.steps_per_s > 0
        assert health.runs_memory == 1
        while not (record and record.health.problems):
            record = await _record(world)
        assert "a test's warning (run_pace)" in [each.message for each in record.health.problems]
        while record is None or record.health.unsaved_runs:
            await asyncio.sleep(0.1)
            record = await _record(world)
        assert record.health.snapshot_age_s == 0.0


async def test_a_drained_trainer_keeps_what_comes_for_later(world: World) -> None:
    """While drained nothing new is begun and the queue says why; afterwards everything is done, in order."""
    first = training_script("run_before", steps=1, base_model=world.base_name)
    later = training_script("run_later", steps=2, base_model=world.base_name)
    async with world.trainer(), asyncio.timeout(WAIT_S):
        await world.submit(*first.messages)
        await world.results(first)
        while (record := await _record(world)) is None:
            await asyncio.sleep(0.05)
        trainer_id = record.trainer_id
        assert await _told(world, trainer_id, "drain") == Controlled(draining=True)
        await world.submit(*later.messages)
        while not ((record := await _record(world)) and record.draining and record.health.waiting):
            await asyncio.sleep(0.05)
        last = later.messages[-1]
        operation = operation_id(last.run_id, last.seq)
        answer = await world.client.request(
            queue_subject(world.base_name), operation.encode(), timeout=5
        )
        state = journal.decode_queue_state(answer.data)
        assert state.state == "queued"
        assert "admin" in state.reason
        await asyncio.sleep(1.5)
        assert await journal.find_result(world.js, operation) is None
        assert await _told(world, trainer_id, "undrain") == Controlled(draining=False)
        results = await world.results(later)
        assert [result.error for result in results] == [None] * len(results)


async def test_a_trainer_in_this_process_leaves_when_told(world: World) -> None:
    """Told to start again, it tells what it has done, lets go of its lease and returns; a successor goes on."""
    script = training_script("run_again", steps=4, base_model=world.base_name)
    middle = len(script.messages) // 2
    async with asyncio.timeout(WAIT_S):
        async with world.trainer():
            await world.submit(*script.messages[:middle])
            while (record := await _record(world)) is None:
                await asyncio.sleep(0.05)
            told = await _told(world, record.trainer_id, "restart")
            assert told == Controlled(draining=True)
            await world.submit(*script.messages[middle:])
            while [task for task in asyncio.all_tasks() if _is_of_a_service(task)]:
                await asyncio.sleep(0.05)
        async with world.trainer():
            results = await world.results(script)
    assert [result.error for result in results] == [None] * len(results)
    assert [result.seq for result in results] == [message.seq for message in script.messages]


def _is_of_a_service(task: asyncio.Task[object]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "") == "Service.run"


@pytest.mark.slow
async def test_a_trainer_process_ends_with_a_code_that_has_it_started_again(
    world: World, nats_url: str, tiny_moe: Path
) -> None:
    """What it had been given before is done, and a supervisor sees `EXIT_AGAIN`."""
    script = training_script("run_process", steps=2, base_model=world.base_name)
    environ = os.environ | {
        "RIVER_NATS_URL": nats_url,
        "RIVER_BASE_MODEL": world.base_name,
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_DATA_DIR": str(world.directory),
        "RIVER_PORT": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = [sys.executable, "-m", "river_trainer.main"]
    process = await asyncio.create_subprocess_exec(*program, env=environ)
    try:
        async with asyncio.timeout(WAIT_S):
            await world.submit(*script.messages)
            await world.results(script)
            while (record := await _record(world)) is None:
                await asyncio.sleep(0.05)
            assert (await _told(world, record.trainer_id, "restart")).draining
            assert await process.wait() == EXIT_AGAIN
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
