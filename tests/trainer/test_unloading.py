"""Runs that are unloaded: out of memory at once, and as they were when they are asked for anything again."""

# What is waited for happens in another task, and only the trainer's own state tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio

from support.trainer_world import WAIT_S, World
from support.training import ADAM, forward_backward, timeless, training_script

from river_trainer.protocol import OptimStep, Unload
from river_trainer.service import Service


async def until_gone(service: Service, run_id: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while service._residency.holds(run_id):
            await asyncio.sleep(0.02)


async def test_an_unloaded_run_leaves_memory_and_comes_back(world: World) -> None:
    """With its pending gradient, long before it would count as idle; unloading it again does no harm."""
    world.options = {"snapshot_idle_s": 3600.0, "snapshot_every_steps": 1000}
    script = training_script("run_leaving", steps=2, base_model=world.base_name)
    script.do(forward_backward(4, [9, 7]))
    script.do(Unload())
    async with world.trainer() as service:
        await world.submit(*script.messages)
        result = await world.result(script.messages[-1])
        assert (result.error, result.step, result.training_tokens) == (None, 2, 0)
        await until_gone(service, "run_leaving")
        assert await world.journal_size("run_leaving") == 0
        again = script.do(Unload())
        await world.submit(again)
        assert (await world.result(again)).error is None
        await until_gone(service, "run_leaving")
        step = script.do(OptimStep(adam=ADAM))
        await world.submit(step)
        stepped = await world.result(step)
        assert service._residency.holds("run_leaving")
    twin = training_script("run_staying", steps=2, base_model=world.base_name)
    twin.do(forward_backward(4, [9, 7]))
    twin.do(OptimStep(adam=ADAM))
    async with world.trainer() as service:
        await world.submit(*twin.messages)
        expected = (await world.results(twin))[-1]
        assert service._residency.holds("run_staying")
    assert timeless(stepped.metrics) == timeless(expected.metrics)
    assert stepped.step == expected.step == 3


async def test_what_comes_behind_an_unload_keeps_the_run(world: World) -> None:
    """An operation that was sent along with it is done, and the run stays, since it is in use."""
    world.options = {"snapshot_idle_s": 3600.0, "snapshot_every_steps": 1000}
    script = training_script("run_wanted", steps=1, base_model=world.base_name)
    script.do(Unload())
    last = script.do(forward_backward(4, [9]))
    async with world.trainer() as service:
        await world.submit(*script.messages)
        assert [result.error for result in await world.results(script)] == [None] * 6
        await asyncio.sleep(1.5)
        assert service._residency.holds("run_wanted")
        assert (await world.result(last)).training_tokens == 9
