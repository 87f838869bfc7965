"""Runs that learn from feedback, in tests: completions with rewards, and what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
from support.gateway import Rig
from support.stand_ins import BASE, PATIENCE_S

from river_client.learning_wire import LearningState
from river_trainer.protocol import TrainMessage, TrainStep

ALIAS = "tutor"


async def point_alias(rig: Rig, target: str = BASE) -> None:
    answer = await rig.tenant.http.put(f"/river/v1/aliases/{ALIAS}", json={"target": target})
    assert answer.status_code == 200, answer.text


async def judged(rig: Rig, *rewards: float, model: str = ALIAS) -> list[str]:
    """Completions with these rewards."""
    chat = rig.tenant.openai.chat.completions
    messages: Any = [{"role": "user", "content": "x"}]
    ids = [
        (await chat.create(model=model, messages=messages, store=True)).id for _reward in rewards
    ]
    given = [
        {"completion_id": completion, "reward": reward}
        for completion, reward in zip(ids, rewards, strict=True)
    ]
    answer = await rig.tenant.post("/feedback", {"feedback": given})
    assert answer.status_code == 204, answer.text
    return ids


async def start(rig: Rig, run_id: str, **changes: Any) -> httpx.Response:
    asked = {"alias": ALIAS, "adam": {"lr": 0.01}, "min_batch": 2, "max_batch": 2} | changes
    return await rig.tenant.http.put(f"/river/v1/runs/{run_id}/learning", json=asked)


async def started(rig: Rig, run_id: str, **changes: Any) -> LearningState:
    answer = await start(rig, run_id, **changes)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=LearningState)


async def stop(rig: Rig, run_id: str) -> LearningState:
    answer = await rig.tenant.http.delete(f"/river/v1/runs/{run_id}/learning")
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=LearningState)


async def state_of(rig: Rig, run_id: str) -> LearningState:
    answer = await rig.tenant.get(f"/runs/{run_id}/learning")
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=LearningState)


async def reached(
    rig: Rig,
    run_id: str,
    condition: Callable[[LearningState], bool],
    patience_s: float = PATIENCE_S,
) -> LearningState:
    """The first state of a run's learning for which the condition holds."""

    async def look() -> LearningState | None:
        state = await state_of(rig, run_id)
        return state if condition(state) else None

    return await until(look, patience_s)


async def until(look: Callable[[], Awaitable[Any]], patience_s: float = PATIENCE_S) -> Any:
    """The first true value that can be awaited."""
    async with asyncio.timeout(patience_s):
        while not (value := await look()):  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.05)
        return value


def steps_of(rig: Rig, run_id: str) -> list[TrainMessage]:
    """The training steps that the trainer was sent for a run."""
    return [
        message
        for message in rig.trainer.messages
        if message.run_id == run_id and isinstance(message.task, TrainStep)
    ]
