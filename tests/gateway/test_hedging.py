"""Requests that take long are asked of a second engine: the race itself, and what clients and bills see of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from support.gateway import Rig, eventually, running_rig
from support.stand_in_answers import COMPLETION_TOKENS
from support.stand_ins import BASE, StandInEngine

from river_billing.events import UsageKind
from river_client import wire
from river_gateway.engines.hedging import first_answer
from river_gateway.errors import InvalidFieldError, UnavailableError

AFTER_S = 0.3
MESSAGES: Any = [{"role": "user", "content": "question"}]
"""Equal prompts go to one engine first."""

# ---- The race --------------------------------------------------------------------------------------------------------


class Race:
    """`first_answer` of two that take their time; `discarded` has the answers that came too late."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.discarded: list[str] = []

    async def run(self, first: tuple[float, Any], second: tuple[float, Any]) -> str:
        """Each is how many times `AFTER_S` it takes, and what comes: an answer, an error, or None."""
        return await first_answer(
            self._ask("first", *first),
            lambda: self._ask("second", *second),
            after_s=AFTER_S,
            discard=self.discarded.append,
        )

    async def _ask(self, name: str, times: float, outcome: Any) -> Any:
        self.asked.append(name)
        try:
            await asyncio.sleep(times * AFTER_S)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            if outcome == "stubborn":
                return outcome
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


AWAY = UnavailableError("away")
WRONG = InvalidFieldError("wrong")


@pytest.mark.parametrize(
    ("first", "second", "answer", "asked", "cancelled"),
    [
        ((0.5, "a"), (0, "b"), "a", 1, []),
        ((9, "a"), (1, "b"), "b", 2, ["first"]),
        ((3, "a"), (9, "b"), "a", 2, ["second"]),
        ((3, "a"), (0, None), "a", 2, []),
        ((3, "a"), (1, AWAY), "a", 2, []),
        ((2, AWAY), (3, "b"), "b", 2, []),
    ],
    ids=[
        "quick",
        "the second is first",
        "the first is first",
        "nobody to ask",
        "the second fails",
        "the first fails",
    ],
)
async def test_the_first_answer_counts(
    first: tuple[float, Any],
    second: tuple[float, Any],
    answer: str,
    asked: int,
    cancelled: list[str],
) -> None:
    """Whichever it is of; the other is cancelled, and nobody is asked for nothing."""
    race = Race()
    assert await race.run(first, second) == answer
    assert len(race.asked) == asked
    assert race.cancelled == cancelled
    assert race.discarded == []


@pytest.mark.parametrize(
    ("first", "second", "error", "asked"),
    [
        ((0.5, AWAY), (0, "b"), AWAY, 1),
        ((2, AWAY), (0, None), AWAY, 2),
        ((2, AWAY), (2, UnavailableError("other")), AWAY, 2),
        ((2, WRONG), (9, "b"), WRONG, 2),
    ],
    ids=["at once", "nobody else", "both", "the request's fault"],
)
async def test_without_an_answer_the_first_error_counts(
    first: tuple[float, Any], second: tuple[float, Any], error: Exception, asked: int
) -> None:
    """What the first engine says of the request; what is wrong everywhere is told without waiting for the other."""
    race = Race()
    with pytest.raises(type(error)) as raised:
        await race.run(first, second)
    assert raised.value is error
    assert len(race.asked) == asked


async def test_an_answer_too_late_is_discarded() -> None:
    """Of the one that could not be cancelled in time."""
    race = Race()
    assert await race.run((3, "a"), (9, "stubborn")) == "a"
    assert race.discarded == ["stubborn"]


async def test_an_answer_that_comes_as_the_client_leaves_is_discarded() -> None:
    """Cancelled in the same round of the loop in which the answer came, the request keeps nothing open."""
    discarded: list[str] = []
    came = asyncio.get_running_loop().create_future()

    async def second() -> str | None:
        return None

    async def first() -> str:
        return await came

    racing = asyncio.create_task(
        first_answer(first(), second, after_s=AFTER_S, discard=discarded.append)
    )
    await asyncio.sleep(0.01)
    came.set_result("answer")
    await asyncio.sleep(0)  # The one that asks has ended; who waits for it has not been told.
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert discarded == ["answer"]


async def test_who_leaves_ends_both() -> None:
    """A client that goes away is nobody's client any more."""
    race = Race()
    racing = asyncio.create_task(race.run((9, "a"), (9, "b")))
    await asyncio.sleep(2 * AFTER_S)
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert sorted(race.cancelled) == ["first", "second"]


# ---- The gateway -----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def rig(postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A gateway that asks a second engine soon."""
    async with running_rig(
        postgres_url, nats_url, tmp_path, hedge_after_ms=1000 * AFTER_S
    ) as running:
        yield running


async def _ask(rig: Rig, *, stream: bool = False, model: str = BASE) -> str:
    answer = await rig.tenant.openai.chat.completions.create(
        model=model, messages=MESSAGES, stream=stream
    )
    if not isinstance(answer, openai.AsyncStream):
        return answer.choices[0].message.content or ""
    pieces = [chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices]
    return "".join(pieces)


async def _home(rig: Rig) -> tuple[StandInEngine, StandInEngine]:
    """The engine that `MESSAGES` go to, and the other one."""
    await _ask(rig)
    one, other = rig.engines
    return (one, other) if one.requests else (other, one)


def _hedges(rig: Rig) -> float:
    return rig.services.telemetry.registry.get_sample_value("river_gateway_hedges_total") or 0.0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_second_engine_answers(rig: Rig, stream: bool) -> None:
    """When the first has not begun in time; that one is told to stop, and the request is one in bills and limits."""
    limits = {"requests_per_minute": 3, "concurrent_requests": 1}
    path = f"/river/v1/keys/{rig.tenant.key_id}/limits"
    assert (await rig.admin.http.patch(path, json=limits)).status_code == 200
    home, other = await _home(rig)
    home.behaviour = "mute"
    for _ in range(2):
        assert (await _ask(rig, stream=stream)).startswith("w0 ")
    await eventually(lambda: home.cancelled == 2)
    assert len(other.requests) == _hedges(rig) == 2
    events = await rig.usage(3)
    assert len({event.event_id for event in events}) == 3
    assert {event.quantities[UsageKind.COMPLETION] for event in events} == {COMPLETION_TOKENS}
    with pytest.raises(openai.RateLimitError):
        await _ask(rig)
    assert rig.services.upstream.fleet.visits == 0


async def test_what_has_begun_is_not_asked_again(rig: Rig) -> None:
    """A stream that hangs after its first byte, and a request that is refused, stay where they are."""
    home, other = await _home(rig)
    home.behaviour = "hang"
    answer: Any = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True
    )
    await asyncio.sleep(3 * AFTER_S)
    await answer.close()
    home.behaviour = "refuse"
    with pytest.raises(openai.BadRequestError):
        await _ask(rig)
    assert not other.requests
    assert _hedges(rig) == 0


async def test_an_adapter_is_not_loaded_for_a_copy(rig: Rig) -> None:
    """A run that one engine holds waits for that one; held by both, it is asked of both."""
    run = await rig.tenant.new_run()
    version = f"{run.run_id}@0"
    holder, other = rig.engines
    await rig.register(holder.record(resident=[version]))
    holder.behaviour = "mute"
    model = f"river://{run.run_id}"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(_ask(rig, model=model), 5 * AFTER_S)
    assert not other.requests
    await rig.register(other.record(resident=[version]))
    other.behaviour = "mute"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(_ask(rig, model=model), 5 * AFTER_S)
    assert len(holder.requests) == 2
    assert len(other.requests) == 1


async def test_copies_do_not_add_to_a_jam(rig: Rig) -> None:
    """While all engines are slow, few requests have copies."""
    for engine in rig.engines:
        engine.behaviour = "mute"
    asking = [asyncio.create_task(_ask(rig)) for _ in range(20)]
    await asyncio.sleep(5 * AFTER_S)
    assert 1 <= _hedges(rig) <= 3
    assert sum(len(engine.requests) for engine in rig.engines) == 20 + _hedges(rig)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await eventually(lambda: rig.services.upstream.fleet.visits == 0)


async def test_samples_are_asked_once(rig: Rig) -> None:
    """They are long by nature."""
    for engine in rig.engines:
        engine.behaviour = "mute"
    asked = wire.SampleRequest(model=BASE, prompts=["x"], max_tokens=4)
    sampling = asyncio.create_task(rig.tenant.post("/sample", asked))
    await asyncio.sleep(3 * AFTER_S)
    assert sum(len(engine.samples) for engine in rig.engines) == 1
    assert _hedges(rig) == 0
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
