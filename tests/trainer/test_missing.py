"""Operations that never come and runs whose past is gone: a clear error; nobody hangs or is set back in silence."""

# What is waited for happens in another task, and only NATS tells.

from __future__ import annotations

import asyncio
import shutil

import pytest
from support.trainer_world import World
from support.training import ADAM, RunScript, forward_backward, shape, training_script

from river_billing.events import RunAdvanced, catalog_subject
from river_engine.protocol import subject_token
from river_trainer import journal
from river_trainer.protocol import CreateRun, OptimStep, QueueState, operation_id, queue_subject


async def queue_state(world: World, run_id: str, seq: int) -> QueueState:
    operation = operation_id(run_id, seq).encode()
    answer = await world.client.request(queue_subject(world.base_name), operation, timeout=5)
    return journal.decode_queue_state(answer.data)


async def test_what_waits_for_a_missing_operation_fails_in_the_end(world: World) -> None:
    """After the limit all that waited fails with a sentence; the late one fails too, others and later ones are done."""
    script = training_script("run_gap", steps=1, base_model=world.base_name)
    missing = script.do(forward_backward(1, [8]))
    waiting = [script.do(OptimStep(adam=ADAM)), script.do(forward_backward(2, [8]))]
    other = training_script("run_beside_gap", steps=1, base_model=world.base_name)
    world.options = {"gap_max_s": 1.5}
    async with world.trainer():
        await world.submit(*script.messages[:-3], *waiting)
        before = await world.results(RunScript("", messages=script.messages[:-3]))
        state = await queue_state(world, "run_gap", waiting[1].seq)
        assert state.state == "waiting_for_gap"
        assert f"operation {missing.seq} " in state.reason
        await world.submit(*other.messages)
        assert (await world.results(other))[-1].step == 1
        error = (await world.result(waiting[0])).error
        assert error is not None
        assert error.type == "operation_missing"
        assert f"operation {missing.seq} of the run did not come within" in error.message
        assert (await world.result(waiting[1])).error == error
        assert (await world.result(missing)).error == error
        # It comes after all, when its failure has been told.
        await world.submit(missing)
        later = [script.do(forward_backward(3, [8])), script.do(OptimStep(adam=ADAM))]
        await world.submit(*later)
        assert (await world.result(later[1])).step == before[-1].step + 1
        assert (await world.result(missing)).error == error


async def test_a_gap_that_was_given_up_is_not_waited_for_again(world: World) -> None:
    """A successor of the trainer that gave up goes on at once where that had gone on."""
    script = training_script("run_gap_told", steps=1, base_model=world.base_name)
    script.do(forward_backward(1, [8]))  # A pending gradient keeps the journal.
    script.next_seq += 1
    waiting = script.do(forward_backward(2, [8]))
    later = script.do(forward_backward(3, [8]))
    world.options = {"gap_max_s": 1.0}
    async with world.trainer():
        await world.submit(*script.messages)
        assert (await world.result(waiting)).error is not None
        assert (await world.result(later)).error is not None
        after = script.do(forward_backward(4, [8]))
        await world.submit(after)
        assert (await world.result(after)).error is None
    world.options = {"gap_max_s": 3600.0}
    async with world.trainer():
        step = script.do(OptimStep(adam=ADAM))
        await world.submit(step)
        assert (await world.result(step)).step == 2


async def test_a_run_whose_state_is_gone_says_so(world: World) -> None:
    """Without snapshot and journal a run is lost: its next operations say so, and no other run notices."""
    lost = training_script("run_lost", steps=2, base_model=world.base_name)
    kept = training_script("run_kept", steps=2, base_model=world.base_name)
    async with world.trainer():
        await world.submit(*lost.messages, *kept.messages)
        await world.results(lost)
        await world.results(kept)
        await world.until_trimmed("run_lost")
        await world.until_trimmed("run_kept")
    snapshots = world.directory / "store/snapshots" / subject_token(world.base_name)
    shutil.rmtree(snapshots / "run_lost")
    async with world.trainer():
        for script in (lost, kept):
            await world.submit(script.do(forward_backward(1, [8])), script.do(OptimStep(adam=ADAM)))
        for message in lost.messages[-2:]:
            error = (await world.result(message)).error
            assert error is not None
            assert error.type == "run_lost"
            assert "snapshot" in error.message
        assert (await world.result(kept.messages[-1])).step == 3
    async with world.trainer():  # It stays lost.
        again = lost.do(forward_backward(1, [8]))
        await world.submit(again)
        error = (await world.result(again)).error
        assert error is not None
        assert error.type == "run_lost"


@pytest.mark.parametrize("damage", ["newest gone", "damaged"])
async def test_a_run_is_never_set_back_in_silence(world: World, damage: str) -> None:
    """A run whose newest snapshot is gone or damaged does not go on from an older one: it is lost, and told to be."""
    run_id = f"run_back_{damage.replace(' ', '_')}"
    script = training_script(run_id, steps=2, base_model=world.base_name)
    snapshots = world.directory / "store/snapshots" / subject_token(world.base_name) / run_id
    async with world.trainer():
        await world.submit(*script.messages)
        await world.results(script)
        await world.until_trimmed(run_id)
        older = next(snapshots.iterdir())
        shutil.copytree(older, world.directory / "older")
        more = [script.do(forward_backward(1, [8])), script.do(OptimStep(adam=ADAM))]
        await world.submit(*more)
        await world.result(more[-1])
        await world.until_trimmed(run_id)
    newest = snapshots / str(more[-1].seq)
    if damage == "newest gone":
        shutil.rmtree(newest)
        shutil.copytree(world.directory / "older", snapshots / older.name)
    else:
        weights = newest / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    async with world.trainer():
        for task in (forward_backward(2, [8]), OptimStep(adam=ADAM)):
            message = script.do(task)
            await world.submit(message)
            error = (await world.result(message)).error
            assert error is not None
            assert error.type == "run_lost"
        told = await world.events(catalog_subject(run_id), run_id)
        assert isinstance(told[-1], RunAdvanced)
        assert told[-1].lost is not None


@pytest.mark.parametrize("late", [False, True], ids=["before the limit", "while others work"])
async def test_an_operation_that_comes_late_is_done(world: World, *, late: bool) -> None:
    """Whatever order operations arrive in, a gap that closes in time costs nothing but the wait."""
    script = training_script(f"run_late{late:d}", steps=2, base_model=world.base_name)
    other = RunScript(f"run_busy{late:d}", world.base_name)
    other.do(CreateRun(shape=shape(rank=2)))
    for seed in range(6 if late else 0):
        other.do(forward_backward(seed, [40, 40]))
    first, second, *rest = script.messages
    async with world.trainer():
        await world.submit(first, *rest, *other.messages)
        await asyncio.sleep(0.3)
        await world.submit(second)
        results = await world.results(script)
        assert [result.error for result in results] == [None] * len(results)
        assert results[-1].step == 2
