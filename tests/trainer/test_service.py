"""The trainer on a real nats-server: order, duplicates, replay, and a process killed in the middle."""

# What is waited for happens in another process or task, and only NATS or the disk tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

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
    timeless,
    training_script,
)
from support.workbench import Workbench

from river_billing.events import (
    CheckpointSaved,
    RunAdvanced,
    UsageEvent,
    UsageKind,
    catalog_subject,
    training_event_id,
    usage_subject,
)
from river_engine.protocol import publish_subject
from river_trainer import journal
from river_trainer.protocol import (
    BODIES_BUCKET,
    CreateRun,
    ForwardBackward,
    LoadWeights,
    OptimStep,
    SaveWeights,
    Sequence,
    train_subject,
)

Maker = Callable[..., Workbench]


async def test_an_operation_has_all_its_effects(world: World) -> None:
    """Result, live version, adapter files, announcement, usage and catalog events all tell the same."""
    announced = await world.client.subscribe(publish_subject(world.base_name))
    script = training_script("run_effects", steps=1, base_model=world.base_name)
    script.do(SaveWeights(checkpoint_id="ckpt_effects", name="final", mode="inference"))
    async with world.trainer() as service:
        await world.submit(*script.messages)
        results = await world.results(script)
        assert [result.error for result in results] == [None] * 5
        live = await world.live("run_effects")
        assert (live.step, live.adapter.name) == (1, "run_effects@1")
        folder = Path(live.adapter.location.removeprefix("file://"))
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        first = await announced.next_msg(timeout=WAIT_S)
        assert b"run_effects@0" in first.data
        assert b"run_effects@1" in (await announced.next_msg(timeout=WAIT_S)).data

        usage = await world.events(usage_subject("ten_test"), "run_effects")
        counted = [event for event in usage if isinstance(event, UsageEvent)]
        assert [event.event_id for event in counted] == [
            training_event_id("run_effects-1"),
            training_event_id("run_effects-2"),
        ]
        assert [event.quantities for event in counted] == [
            {UsageKind.TRAINING: 32},
            {UsageKind.TRAINING: 9},
        ]
        assert counted[0].occurred_at == script.messages[1].submitted_at
        catalog = await world.events(catalog_subject("run_effects"), "run_effects")
        advanced = [event for event in catalog if isinstance(event, RunAdvanced)]
        assert [(event.seq, event.step) for event in advanced] == [
            (0, 0),
            (1, 0),
            (2, 0),
            (3, 1),
            (4, 1),
        ]
        saved = [event for event in catalog if isinstance(event, CheckpointSaved)]
        assert saved == [results[-1].checkpoint]
        assert b"river_trainer_tokens_total 41.0" in service.metrics.page()
        assert service.ready


async def test_order_and_duplicates(world: World) -> None:
    """Operations that arrive late, early or twice are done once each, by seq."""
    ordered = training_script("run_ordered", steps=2, base_model=world.base_name)
    mixed = training_script("run_mixed", steps=2, base_model=world.base_name)
    first, *rest = mixed.messages
    async with world.trainer() as service:
        await world.submit(*ordered.messages)
        await world.submit(*reversed(rest))
        await world.submit(first)
        # Past the deduplication window a copy gets a message of its own.
        for message in mixed.messages[1:3]:
            await world.js.publish(
                train_subject(world.base_name, "run_mixed"),
                journal.encode(message),
                headers={journal.MESSAGE_ID_HEADER: f"run_mixed:{message.seq:04d}"},
            )
        expected, results = await world.results(ordered), await world.results(mixed)
        assert [timeless(result.metrics) for result in results] == [
            timeless(result.metrics) for result in expected
        ]
        assert [result.step for result in results] == [0, 0, 0, 1, 1, 1, 2]
        await world.until_trimmed("run_mixed")
        assert (await world.live("run_mixed")).step == 2
        assert b"river_trainer_tokens_total 164.0" in service.metrics.page()


async def test_large_bodies_travel_by_object_store(world: World) -> None:
    """An operation over the inline limit arrives whole, and its object goes with its message."""
    script = RunScript("run_large", world.base_name)
    script.do(CreateRun(shape=shape(rank=1)))
    # The mistake in the last sequence saves the computation and proves that all of it came.
    data = [*random_sequences(1, [200] * 200), Sequence(input_ids=integers([VOCAB_SIZE]))]
    script.do(ForwardBackward(data=data, loss_fn="cross_entropy", loss_config={}))
    bucket = await world.js.object_store(BODIES_BUCKET)
    await world.submit(*script.messages)
    before = (await bucket.status()).size
    assert before > 512 * 1024
    async with world.trainer():
        error = (await world.results(script))[-1].error
        assert error is not None
        assert error.param == "data[200].input_ids[0]"
        await world.until_trimmed("run_large")
        async with asyncio.timeout(WAIT_S):
            while (await bucket.status()).size >= before:
                await asyncio.sleep(0.05)


async def test_a_new_trainer_goes_on_where_the_old_one_stopped(
    world: World, make_executor: Maker
) -> None:
    """With pending gradients, after a snapshot and a trimmed journal, nothing is lost or told twice."""
    script = training_script("run_handover", steps=3, base_model=world.base_name)
    script.do(forward_backward(5, [12, 20]))
    async with world.trainer():
        await world.submit(*script.messages)
        await world.results(script)
    later = [script.do(OptimStep(adam=ADAM)), script.do(forward_backward(5, [12, 20]))]
    async with world.trainer() as service:
        await world.submit(*later)
        results = await world.results(script)
        # The replayed forward_backward was told before; only the new one counts.
        assert b"river_trainer_tokens_total 32.0" in service.metrics.page()
    alone = make_executor()
    expected = [alone.execute(message) for message in script.messages]
    assert [timeless(result.metrics) for result in results] == [
        timeless(result.metrics) for result in expected
    ]
    assert results[-1].step == 4
    usage = await world.events(usage_subject("ten_test"), "run_handover")
    assert len(usage) == 8


async def test_a_failed_operation_stays_failed_on_replay(world: World) -> None:
    """What was told to have failed is not done after all by a replay."""
    script = RunScript("run_failed", world.base_name)
    for task in (CreateRun(shape=shape()), OptimStep(adam=ADAM), forward_backward(1, [8])):
        script.do(task)
    bad = RunScript("run_never", world.base_name)
    bad.do(CreateRun(shape=shape(rank=1000)))
    async with world.trainer():
        await world.submit(*script.messages, *bad.messages)
        assert (await world.results(script))[1].error is not None
        await world.results(bad)
        await world.until_trimmed("run_never")
    async with world.trainer():
        await world.submit(script.do(OptimStep(adam=ADAM)), bad.do(OptimStep(adam=ADAM)))
        assert (await world.result(script.messages[-1])).step == 1
        refused = (await world.result(bad.messages[-1])).error
        assert refused is not None
        assert refused.type == "run_unavailable"


async def test_a_lost_adapter_directory_is_written_again(world: World) -> None:
    """After a restart every live version can be loaded, even if its directory was on a volatile disk."""
    script = training_script("run_volatile", steps=1, base_model=world.base_name)
    async with world.trainer():
        await world.submit(*script.messages)
        await world.results(script)
        await world.until_trimmed("run_volatile")
    folder = Path((await world.live("run_volatile")).adapter.location.removeprefix("file://"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    async with world.trainer(), asyncio.timeout(WAIT_S):
        while not folder.exists():
            await asyncio.sleep(0.02)


async def test_a_run_goes_on_after_loading_and_dying(world: World) -> None:
    """The snapshot that a load makes holds the load: a successor neither repeats it nor finds the run too far on."""
    script = training_script("run_loaded", steps=2, base_model=world.base_name)
    save = script.do(SaveWeights(checkpoint_id="ckpt_loaded", name="x", mode="training"))
    world.options = {"snapshot_idle_s": 3600.0, "snapshot_every_steps": 1000}
    async with world.trainer():
        await world.submit(*script.messages)
        checkpoint = (await world.result(save)).checkpoint
        assert checkpoint is not None
        load = script.do(LoadWeights(location=checkpoint.location, optimizer=True))
        later = script.do(forward_backward(1, [8]))
        await world.submit(load, later)
        assert (await world.result(load)).step == 3
        assert (await world.result(later)).error is None
    async with world.trainer():
        step = script.do(OptimStep(adam=ADAM))
        await world.submit(step)
        result = await world.result(step)
        assert (result.error, result.step) == (None, 4)


async def test_a_pending_gradient_survives_an_idle_time(world: World) -> None:
    """A run that is left alone with a gradient is snapshotted with it, its journal goes, and it steps as if nothing."""
    script = training_script("run_idle", steps=1, base_model=world.base_name)
    script.do(forward_backward(4, [9, 7]))
    async with world.trainer():
        await world.submit(*script.messages)
        await world.until_trimmed("run_idle")
    script.do(forward_backward(5, [6]))
    script.do(OptimStep(adam=ADAM))
    async with world.trainer():
        await world.submit(*script.messages[-2:])
        told = await world.results(script)
    together = training_script("run_idle_twin", steps=1, base_model=world.base_name)
    for message in script.messages[-3:]:
        together.do(message.task)
    async with world.trainer():
        await world.submit(*together.messages)
        expected = await world.results(together)
    assert told[-1].metrics["grad_norm"] == expected[-1].metrics["grad_norm"]


@pytest.mark.parametrize("killed_after", [2, 5], ids=["gradients pending", "later"])
@pytest.mark.slow
async def test_kill_in_the_middle(
    world: World, nats_url: str, tiny_moe: Path, make_executor: Maker, killed_after: int
) -> None:
    """A killed trainer's successor ends with the same losses, and each step was taken once."""
    run_id = f"run_killed{killed_after}"
    script = training_script(run_id, steps=8, base_model=world.base_name)
    environ = {
        **os.environ,
        "RIVER_NATS_URL": nats_url,
        "RIVER_BASE_MODEL": world.base_name,
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_DATA_DIR": str(world.directory),
        "RIVER_PORT": "0",
        "RIVER_SNAPSHOT_EVERY_STEPS": "2",
        "RIVER_SNAPSHOT_INTERVAL_S": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    await world.submit(*script.messages)
    program = [sys.executable, "-m", "river_trainer.main"]
    first = await asyncio.create_subprocess_exec(*program, env=environ)
    try:
        await world.result(script.messages[killed_after])
    finally:
        first.send_signal(signal.SIGKILL)
        await first.wait()
    second = await asyncio.create_subprocess_exec(*program, env=environ)
    try:
        results = await world.results(script)
        second.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert await second.wait() == 0
    finally:
        if second.returncode is None:
            second.kill()
            await second.wait()

    alone = make_executor()
    expected = [alone.execute(message) for message in script.messages]
    assert [result.step for result in results] == [result.step for result in expected]
    for result, reference in zip(results, expected, strict=True):
        assert result.error is None
        assert timeless(result.metrics) == timeless(reference.metrics)
    assert (await world.live(run_id)).step == 8
    usage = await world.events(usage_subject("ten_test"), run_id)
    assert len(usage) == 16
    catalog = await world.events(catalog_subject(run_id), run_id)
    assert [event.seq for event in catalog if isinstance(event, RunAdvanced)] == list(range(25))
