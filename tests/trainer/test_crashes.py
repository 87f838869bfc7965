"""A trainer that dies again and again loses nothing, repeats nothing, and learns what it would have learned anyway."""

# What is waited for happens in another process, and only NATS tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from support.trainer_world import World
from support.training import ADAM, RunScript, forward_backward, random_sequences, shape, timeless
from support.workbench import Workbench

from river_billing.events import RunAdvanced, UsageEvent, catalog_subject, usage_subject
from river_trainer import journal
from river_trainer.protocol import (
    CreateRun,
    Forward,
    OptimStep,
    SaveWeights,
    TrainMessage,
    TrainResult,
    TrainStep,
    operation_id,
)
from river_trainer.store import read_location

Maker = Callable[..., Workbench]

STEPS = 60
KILLS = 20
WINDOW = 6
"""Operations that a client has submitted and not seen the results of."""
PATIENCE_S = 90.0


def tenant_script(number: int, base_model: str) -> RunScript:
    """One tenant's training: several backward passes a step, atomic steps, looks at losses, checkpoints between.

    Now and then gradients are dropped, and a step is meant for a version that the run is not at.
    """
    run_id = f"run_tenant{number}"
    script = RunScript(run_id, base_model, tenant_id=f"ten_{number}")
    script.do(CreateRun(shape=shape(rank=(2, 4, 8)[number], seed=number, unembed=number != 1)))
    for step in range(STEPS):
        adam = msgspec.structs.replace(ADAM, lr=1e-3 * (1 + step % 3))
        seed = 1000 * number + step
        if step % 3 == number:
            data = random_sequences(seed, [9, 14])
            loss = "importance_sampling" if step % 2 else "cross_entropy"
            script.do(TrainStep(data=data, loss_fn=loss, loss_config={}, adam=adam))
            continue
        script.do(forward_backward(seed, [11]))
        if step % 4 == 1:
            script.do(OptimStep(adam=adam, expected_policy=f"{run_id}@{step + 1}"))
        again = forward_backward(seed + 500, [5, 7])
        script.do(msgspec.structs.replace(again, zero_gradients=step % 4 == 2))
        script.do(OptimStep(adam=adam, expected_policy=f"{run_id}@{step}"))
        if step % 10 == 5:
            data = random_sequences(7, [12])
            script.do(Forward(data=data, loss_fn="cross_entropy", loss_config={}))
            script.do(SaveWeights(checkpoint_id=f"ckpt_{number}_{step}", name="x", mode="training"))
    script.do(SaveWeights(checkpoint_id=f"ckpt_{number}_end", name="end", mode="training"))
    return script


@dataclass(slots=True)
class Progress:
    """How many results all tenants have seen."""

    results: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self) -> None:
        self.results += 1
        self.changed.set()

    async def reach(self, results: int) -> None:
        while self.results < results:
            self.changed.clear()
            await self.changed.wait()


async def run_tenant(world: World, script: RunScript, progress: Progress) -> list[TrainResult]:
    """A client: keeps a few operations under way and waits for each result in turn."""
    results: list[TrainResult] = []
    submitted = 0
    for number, message in enumerate(script.messages):
        while submitted < min(number + WINDOW, len(script.messages)):
            await world.submit(script.messages[submitted])
            submitted += 1
        results.append(await result_of(world, message))
        progress.count()
    return results


async def result_of(world: World, message: TrainMessage) -> TrainResult:
    operation = operation_id(message.run_id, message.seq)
    async with asyncio.timeout(PATIENCE_S):
        while (result := await journal.find_result(world.js, operation)) is None:
            await asyncio.sleep(0.005)
    return result


@asynccontextmanager
async def supervised(environ: dict[str, str]) -> AsyncIterator[Callable[[], Process]]:
    """A trainer that is started again whenever it has ended; the block may ask for the present one."""
    current: list[Process] = []

    async def keep() -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "river_trainer.main", env=environ
            )
            current[:] = [process]
            await process.wait()

    keeping = asyncio.create_task(keep())
    try:
        while not current:
            await asyncio.sleep(0.01)
        yield lambda: current[0]
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        if current[0].returncode is None:
            current[0].kill()
            await current[0].wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_killed_twenty_times(
    world: World, nats_url: str, tiny_moe: Path, make_executor: Maker
) -> None:
    """Three tenants train sixty steps each while the trainer is killed at twenty random moments.

    Every loss, every count and the final weights and moments are bit for bit those of a run that nobody disturbed, in
    which no two operations shared a batch; every operation is billed and told once.
    """
    source = random.Random(20)
    scripts = [tenant_script(number, world.base_name) for number in range(3)]
    total = sum(len(script.messages) for script in scripts)
    # Kills are spread over the whole training, but each trainer lives long enough to do something.
    moments = sorted(source.sample(range(1, total - 3 * WINDOW), KILLS))
    environ = {
        **os.environ,
        "RIVER_NATS_URL": nats_url,
        "RIVER_BASE_MODEL": world.base_name,
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_DATA_DIR": str(world.directory),
        "RIVER_PORT": "0",
        "RIVER_SNAPSHOT_EVERY_STEPS": "4",
        "RIVER_SNAPSHOT_INTERVAL_S": "0",
        "RIVER_SNAPSHOT_IDLE_S": "0.3",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    progress = Progress()
    async with supervised(environ) as trainer, asyncio.TaskGroup() as tasks:
        tenants = [tasks.create_task(run_tenant(world, script, progress)) for script in scripts]
        for moment in moments:
            await progress.reach(moment)
            await asyncio.sleep(source.uniform(0.0, 0.05))
            victim = trainer()
            victim.send_signal(signal.SIGKILL)
            while trainer() is victim:
                await asyncio.sleep(0.01)
        told = [await tenant for tenant in tenants]

    undisturbed = make_executor()
    for script, results in zip(scripts, told, strict=True):
        expected = [undisturbed.execute(message) for message in script.messages]
        for result, reference in zip(results, expected, strict=True):
            assert result.error == reference.error
            assert result.step == reference.step
            assert result.training_tokens == reference.training_tokens
            assert result.logprobs == reference.logprobs
            assert timeless(result.metrics) == timeless(reference.metrics)
        failed = {result.error.type for result in results if result.error is not None}
        assert failed == {"conflict"}
        assert results[-1].step == STEPS
        assert checkpoint_of(results[-1]) == checkpoint_of(expected[-1])
        await check_events(world, script)


def checkpoint_of(result: TrainResult) -> dict[str, bytes]:
    """The files of the checkpoint that an operation saved."""
    assert result.checkpoint is not None
    found = read_location(result.checkpoint.location)
    assert found is not None
    return found[1]


async def check_events(world: World, script: RunScript) -> None:
    """Every operation is in the catalog in order, and every one with data is billed, once each."""
    run_id = script.run_id
    advanced = [
        event.seq
        for event in await world.events(catalog_subject(run_id), run_id)
        if isinstance(event, RunAdvanced)
    ]
    assert sorted(set(advanced)) == list(range(len(script.messages)))
    usage = [
        event.event_id
        for event in await world.events(usage_subject(script.tenant_id), run_id)
        if isinstance(event, UsageEvent)
    ]
    with_data = [message for message in script.messages if hasattr(message.task, "data")]
    # Telling again after a crash repeats the identity, and the recorder counts an identity once.
    assert len(set(usage)) == len(with_data)
