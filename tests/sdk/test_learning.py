"""Learning from feedback through the SDK, against the real gateway: by the server, and by a loop of one's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from support.gateway import Rig
from support.learning import ALIAS, judged, point_alias, steps_of, until
from support.stand_ins import BASE

import river_client as river
from river_trainer.protocol import ForwardBackward


@pytest_asyncio.fixture
async def model(river_client: river.AsyncClient) -> AsyncIterator[river.AsyncModel]:
    """A model of the real gateway."""
    async with river_client.session() as session:
        yield await session.create_model(BASE)


async def test_the_server_learns_until_it_is_stopped(
    rig: Rig, river_client: river.AsyncClient, model: river.AsyncModel
) -> None:
    """The handle waits for steps and tells of them; nobody trains meanwhile, and afterwards the model goes on."""
    await model.forward([{"input_ids": [1, 2]}])
    learning = await model.learn_from(
        ALIAS, lr=0.1, loss_fn="cispo", min_batch=2, max_batch=2, eps_max=3.0
    )
    assert (await river_client.aliases.get(ALIAS)).target == model.path
    assert learning.state.settings.loss_config == {"eps_max": 3.0}
    await judged(rig, 0.0, 1.0)
    state = await learning.wait(steps=1, timeout=10)
    assert (state.steps, state.completions, state.first_seq) == (1, 2, 2)
    assert model.policy_version == f"{model.run_id}@1"
    with pytest.raises(river.InvalidRequestError, match="stop that first"):
        await model.forward([{"input_ids": [1, 2]}])
    with pytest.raises(river.TimeoutError):
        await learning.wait(completions=3, timeout=0.1)

    async def steps() -> list[int]:
        return [state.steps async for state in learning.steps()]

    seen = asyncio.create_task(steps())
    await judged(rig, 0.0, 1.0)
    await learning.wait(completions=4, timeout=10)
    assert [one.run_id for one in await river_client.learning.list()] == [model.run_id]
    assert (await learning.stop()).status == "stopped"
    assert (await seen)[-1] == 2
    with pytest.raises(river.OperationFailedError, match="it was stopped"):
        await learning.wait(steps=9)
    await model.forward([{"input_ids": [1, 2]}])
    # One that never began takes nothing back from what came after the last.
    await model.forward([{"input_ids": [1, 2]}])
    with pytest.raises(river.InvalidRequestError):
        await model.learn_from(ALIAS, lr=-1.0)
    await model.forward([{"input_ids": [1, 2]}])
    sent = [message.seq for message in rig.trainer.messages if message.run_id == model.run_id]
    assert sent == list(range(7))


async def test_a_failure_is_said(
    rig: Rig, river_client: river.AsyncClient, model: river.AsyncModel
) -> None:
    """Whoever waits, or goes through the steps, is told why there are no more."""
    learning = await model.learn_from(ALIAS, lr=0.1, min_batch=2)
    await river_client.aliases.delete(ALIAS)
    with pytest.raises(river.OperationFailedError, match="the alias 'tutor' is gone"):
        await learning.wait(steps=1, timeout=10)
    with pytest.raises(river.OperationFailedError, match="the alias 'tutor' is gone"):
        await anext(learning.steps())
    again = await model.learn_from(ALIAS, lr=0.1, min_batch=2)
    await judged(rig, 0.0, 1.0)
    assert (await again.wait(steps=1, timeout=10)).reason is None


async def test_wrong_settings_are_named(model: river.AsyncModel) -> None:
    """And the model can be trained as before."""
    with pytest.raises(river.InvalidRequestError) as caught:
        await model.learn_from(ALIAS, lr=-1.0)
    assert caught.value.field == "adam.lr"
    with pytest.raises(river.InvalidRequestError) as caught:
        await model.learn_from(ALIAS, lr=0.1, no_such=1.0)
    assert caught.value.field == "loss_config.no_such"
    await model.forward([{"input_ids": [1, 2]}])


async def test_a_loop_of_ones_own(rig: Rig, model: river.AsyncModel) -> None:
    """A loss that is computed here trains on data that are made here, once each."""
    seen: list[Sequence[Any]] = []

    def prepare(batch: river.FeedbackBatch) -> list[dict[str, Any]]:
        return [
            {"input_ids": datum.input_ids, "reward": one.reward}
            for datum, one in zip(batch.data, batch.feedback, strict=True)
        ]

    def loss(
        logprobs: list[np.ndarray], data: Sequence[Any]
    ) -> tuple[float, list[np.ndarray], dict[str, float]]:
        seen.append([datum["reward"] for datum in data])
        return 1.0, [np.ones_like(one) for one in logprobs], {"mine": 2.0}

    loop = await model.learn_locally(ALIAS, lr=0.1, loss_fn=loss, prepare=prepare, min_batch=2)  # type: ignore[arg-type]
    await judged(rig, 1.0, 1.0)
    await until(_true(lambda: loop.completions == 2))
    await loop.stop()
    assert (loop.steps, loop.error, loop.active) == (1, None, False)
    assert seen == [[1.0, 1.0]]
    assert any(isinstance(message.task, ForwardBackward) for message in rig.trainer.messages)
    # What the loop has learnt from is not learnt from again by the server.
    learning = await model.learn_from(ALIAS, lr=0.1, min_batch=1)
    await judged(rig, 0.0, 1.0)
    assert (await learning.wait(steps=1, timeout=10)).completions == 2
    assert len(steps_of(rig, model.run_id)) == 1


async def test_the_server_takes_a_run_from_a_loop(
    rig: Rig, river_client: river.AsyncClient, model: river.AsyncModel
) -> None:
    """A loop ends with an error when the server has been told to train its model, and loses nothing."""
    await point_alias(rig)
    loop = await model.learn_locally(ALIAS, lr=0.1, min_batch=2, publish="none")
    settings = river.StartLearning(alias=ALIAS, adam=river.AdamParams(lr=0.1), min_batch=64)
    await river_client.learning.start(model.run_id, settings)
    await judged(rig, 0.0, 1.0)
    await until(_true(lambda: not loop.active))
    assert loop.error is not None
    assert "learning from 'tutor'" in str(loop.error)
    assert loop.steps == 0


def _true(condition: Any) -> Any:
    async def look() -> bool:
        return bool(condition())

    return look
