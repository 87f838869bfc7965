"""What a trainer makes of a world that is not as it should be: bodies gone, stores full, two trainers, other bases."""

# What is waited for happens in another process or task, and only NATS or the disk tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from support.trainer_world import WAIT_S, World
from support.training import (
    ADAM,
    VOCAB_SIZE,
    RunScript,
    forward_backward,
    integers,
    random_sequences,
    shape,
    training_script,
)

from river_billing.events import usage_subject
from river_engine.protocol import subject_token
from river_trainer import journal, limits
from river_trainer.protocol import (
    BODY_HEADER,
    RESULT_BODIES_BUCKET,
    RESULTS_MAX_AGE_S,
    TRAIN_STREAM,
    CreateRun,
    ForwardBackward,
    OptimStep,
    SaveWeights,
    Sequence,
    TrainResult,
    operation_id,
    train_subject,
)

LARGE = bytes(600 * 1024)


def snapshots_of(world: World, run_id: str) -> Path:
    return world.directory / "store" / "snapshots" / subject_token(world.base_name) / run_id


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while text not in caplog.text:
            await asyncio.sleep(0.02)


async def test_a_body_that_is_gone_does_not_stop_trimming(world: World) -> None:
    """The object of a done operation vanishes before its journal is trimmed; the trainer goes on."""
    run_id = "run_vanishing"
    script = RunScript(run_id, world.base_name)
    script.do(CreateRun(shape=shape(rank=1)))
    script.do(forward_backward(1, [8]))  # While its gradients wait nothing is trimmed.
    data = [*random_sequences(1, [200] * 200), Sequence(input_ids=integers([VOCAB_SIZE]))]
    script.do(ForwardBackward(data=data, loss_fn="cross_entropy", loss_config={}))
    async with world.trainer():
        await world.submit(*script.messages)
        await world.results(script)
        last = await world.js.get_last_msg(TRAIN_STREAM, train_subject(world.base_name, run_id))
        await journal.delete_body(world.js, (last.headers or {})[BODY_HEADER])
        await world.submit(script.do(OptimStep(adam=ADAM)))
        await world.results(script)
        await world.until_trimmed(run_id)
        await world.submit(script.do(forward_backward(1, [8])))
        assert (await world.results(script))[-1].error is None


async def test_large_results_have_a_bucket_of_their_own(world: World) -> None:
    """They travel whole; where there is no room, they come without their log-probabilities."""
    bucket = await journal.result_bodies_bucket(world.js)
    operations = await (await journal.bodies_bucket(world.js)).status()
    fits = TrainResult(operation_id="run_big-1", run_id="run_big", seq=1, step=3, logprobs=[LARGE])
    await journal.publish_result(world.js, fits)
    assert await journal.find_result(world.js, "run_big-1") == fits
    after = await (await journal.bodies_bucket(world.js)).status()
    assert after.size == operations.size

    stream = f"OBJ_{RESULT_BODIES_BUCKET}"
    config = (await world.js.stream_info(stream)).config
    assert config.max_age == RESULTS_MAX_AGE_S
    size = (await bucket.status()).size
    await world.js.update_stream(config, max_bytes=size + len(LARGE) // 2)
    try:
        unfit = msgspec.structs.replace(fits, operation_id="run_big-2")
        async with asyncio.timeout(WAIT_S):
            await journal.publish_result(world.js, unfit)
    finally:
        await world.js.update_stream(config, max_bytes=limits.RESULT_BODIES_MAX_BYTES)
    bare = msgspec.structs.replace(unfit, logprobs=None)
    assert await journal.find_result(world.js, "run_big-2") == bare


async def test_a_run_that_cannot_be_rebuilt_is_refused(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """When a replay ends elsewhere than what was told, the run trains no further; others do."""
    script = training_script("run_other", steps=1, base_model=world.base_name)
    script.do(forward_backward(5, [8]))
    good = training_script("run_good", steps=1, base_model=world.base_name)
    good.do(forward_backward(5, [8]))
    world.options = {"snapshot_idle_s": 3600.0}  # The journal is to be replayed.
    async with world.trainer():
        await world.submit(*script.messages, *good.messages)
        results = await world.results(script)
        await world.results(good)
    assert results[3].step == 1
    await journal.publish_result(world.js, msgspec.structs.replace(results[3], step=7))
    async with world.trainer():
        await world.submit(script.do(OptimStep(adam=ADAM)), good.do(OptimStep(adam=ADAM)))
        refused = (await world.result(script.messages[-1])).error
        assert refused is not None
        assert refused.type == "run_lost"
        assert (await world.result(good.messages[-1])).step == 2
    assert "cannot rebuild a run: step 1" in caplog.text


async def test_a_refused_run_keeps_its_place_through_restarts(world: World) -> None:
    """Operations passed over in a replay are in the snapshot, so that the next one has its turn."""
    bad = RunScript("run_refused", world.base_name)
    for task in (CreateRun(shape=shape(rank=1000)), OptimStep(adam=ADAM), OptimStep(adam=ADAM)):
        bad.do(task)
    obstacle = snapshots_of(world, "run_refused")
    obstacle.parent.mkdir(parents=True)
    obstacle.write_bytes(b"")  # No snapshot can be written: the journal stays.
    async with world.trainer():
        await world.submit(*bad.messages)
        await world.results(bad)
    obstacle.unlink()
    async with world.trainer():
        await world.until_trimmed("run_refused")
    async with world.trainer():
        await world.submit(bad.do(OptimStep(adam=ADAM)))
        assert (await world.result(bad.messages[-1])).error is not None


async def test_a_loaded_checkpoint_is_told_when_it_is_snapshotted(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the snapshot cannot be stored there is no result; the checkpoint may go right after it."""
    monkeypatch.setattr(limits, "RETRY_DELAY_MAX_S", 1.0)
    source = RunScript("run_source", world.base_name)
    source.do(CreateRun(shape=shape()))
    source.do(SaveWeights(checkpoint_id="ckpt_faults", name="start", mode="training"))
    loading = RunScript("run_loading", world.base_name)
    async with world.trainer():
        await world.submit(*source.messages)
        saved = (await world.results(source))[-1].checkpoint
        assert saved is not None
        await world.until_trimmed("run_source")
        obstacle = snapshots_of(world, "run_loading")
        obstacle.write_bytes(b"")
        first = loading.do(CreateRun(shape=shape(), checkpoint=saved.location))
        await world.submit(first)
        await until_logged(caplog, "the store does not answer")
        assert await journal.find_result(world.js, operation_id("run_loading", 0)) is None
        obstacle.unlink()
        assert (await world.result(first)).error is None
        assert list(obstacle.glob("0/manifest.json"))


async def test_operations_on_a_base_of_a_similar_name_are_left_alone(world: World) -> None:
    """Two names may share a subject; a trainer does what names its own base."""
    similar = world.base_name.replace("/", "_")
    assert train_subject(similar, "r") == train_subject(world.base_name, "r")
    foreign = training_script("run_foreign", steps=1, base_model=similar)
    own = training_script("run_own", steps=1, base_model=world.base_name)
    async with world.trainer():
        await world.submit(*foreign.messages, *own.messages)
        await world.results(own)
    for message in foreign.messages:
        operation = operation_id(message.run_id, message.seq)
        assert await journal.find_result(world.js, operation) is None


async def test_a_second_trainer_waits_for_the_first(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Each operation is done by one of them, and the second goes on when the first has stopped."""
    script = training_script("run_shared", steps=2, base_model=world.base_name)
    async with AsyncExitStack() as stack:
        async with world.trainer() as first:
            await world.submit(script.messages[0])
            await world.result(script.messages[0])
            second = await stack.enter_async_context(world.trainer())
            await until_logged(caplog, "another trainer of this base model is at work")
            await world.submit(*script.messages[1:4])
            assert (await world.result(script.messages[3])).step == 1
            assert b"river_trainer_tokens_total 41.0" in first.metrics.page()
            assert not second.ready
        await world.submit(*script.messages[4:])
        assert (await world.results(script))[-1].step == 2
        assert b"river_trainer_tokens_total 41.0" in second.metrics.page()
    assert len(await world.events(usage_subject("ten_test"), "run_shared")) == 4


@pytest.mark.slow
async def test_a_trainer_that_loses_its_lease_stops(
    world: World, nats_url: str, tiny_moe: Path
) -> None:
    """When another one has the base, the process ends with a failure."""
    environ = {
        **os.environ,
        "RIVER_NATS_URL": nats_url,
        "RIVER_BASE_MODEL": world.base_name,
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_DATA_DIR": str(world.directory),
        "RIVER_PORT": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = training_script("run_usurped", steps=1, base_model=world.base_name)
    await world.submit(*script.messages)
    program = [sys.executable, "-m", "river_trainer.main"]
    process = await asyncio.create_subprocess_exec(*program, env=environ)
    try:
        await world.results(script)
        bucket = await journal.leases_bucket(world.js)
        await bucket.put(subject_token(world.base_name), b"usurper")
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
