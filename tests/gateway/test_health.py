"""How requests went, as gateways count it and tell each other."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import Rig, eventually
from support.stand_ins import BASE

from river_gateway.bus import Bus
from river_gateway.context import RequestContext
from river_gateway.health.readings import POINT_S, read
from river_gateway.health.shared import SLOTS_KEPT, SharedHealth
from river_gateway.health.slots import (
    BOUNDS_S,
    SLOT_S,
    STREAM_BROKEN,
    Outcome,
    Series,
    Slot,
    bucket_of,
    failed_share,
    outcome_of,
    quantile_s,
)
from river_gateway.health.window import OTHER, Window
from river_gateway.limits import HEALTH_FAILURES_MAX, HEALTH_MESSAGE_MAX_CHARS, HEALTH_SERIES_MAX

COMPLETIONS = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.ANSWERED),
        (202, Outcome.ANSWERED),
        (404, Outcome.REFUSED),
        (422, Outcome.REFUSED),
        (429, Outcome.LIMITED),
        (499, Outcome.LEFT),
        (0, Outcome.LEFT),
        (500, Outcome.FAILED),
        (501, Outcome.REFUSED),
        (503, Outcome.FAILED),
        (507, Outcome.FAILED),
        (STREAM_BROKEN, Outcome.FAILED),
    ],
)
def test_what_has_failed(status: int, outcome: Outcome) -> None:
    """Failed is what is ours to mend, and nothing that a client did."""
    assert outcome_of(status) is outcome


def test_those_who_left_are_in_no_rate() -> None:
    """The rate is of requests that got an answer; without any there is none."""
    assert failed_share({200: 2, 404: 1, 503: 1, 499: 100}) == 0.25
    assert failed_share({499: 3}) is None


@given(st.lists(st.floats(0.0011, BOUNDS_S[-1] * 0.99), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_near(seconds: list[float], share: float) -> None:
    """A quantile from buckets is within a bucket's width of the real one."""
    buckets: dict[int, int] = {}
    for each in seconds:
        buckets[bucket_of(each)] = buckets.get(bucket_of(each), 0) + 1
    ordered = sorted(seconds)
    found = quantile_s(buckets, share)
    assert found is not None
    exact = ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
    assert exact / 1.16 <= found <= exact * 1.16


def test_quantiles_at_the_ends() -> None:
    """Nothing has none; what took longer than the last bound counts as that."""
    assert quantile_s({}, 0.5) is None
    assert quantile_s({bucket_of(1e9): 1}, 0.5) == pytest.approx(BOUNDS_S[-1], rel=0.1)
    assert quantile_s({0: 1}, 0.99) == pytest.approx(0.0005)


def test_slots_end_by_the_clock() -> None:
    """Requests are in the slot in which they ended; names, failures and their messages are bounded."""
    clock = Clock()
    window = Window("gw_1", clock)
    window.count(RequestContext(status=200, base_model="m", first_token_s=0.1), COMPLETIONS, 0.4)
    window.count(RequestContext(status=200), "/river/v1/runs/{run_id:str}", 0.01)
    for route in ("/admin/runs", "/metrics", "unmatched", "/v1x"):
        window.count(RequestContext(status=200), route, 0.01)
    assert window.take_ended() == []
    clock.now += SLOT_S
    broken = RequestContext(status=200, base_model="m", broken=True, problem="x" * 10_000)
    for _ in range(2 * HEALTH_FAILURES_MAX):
        window.count(broken, COMPLETIONS, 1.0)
    (first,) = window.take_ended()
    assert first.number == int(1_000_000 / SLOT_S)
    assert first.series == {
        "m": Series(statuses={200: 1}, first={bucket_of(0.1): 1}, whole={bucket_of(0.4): 1}),
        "River API": Series(statuses={200: 1}, whole={bucket_of(0.01): 1}),
    }
    for number in range(3 * HEALTH_SERIES_MAX):
        window.note(f"m{number}", 200, 0.1, None)
    clock.now += 3 * SLOT_S
    (second,) = window.take_ended()
    assert second.series["m"].statuses == {STREAM_BROKEN: 2 * HEALTH_FAILURES_MAX}
    assert len(second.failures) == HEALTH_FAILURES_MAX
    assert len(second.failures[0].message) == HEALTH_MESSAGE_MAX_CHARS
    assert len(second.series) == HEALTH_SERIES_MAX + 1
    assert second.series[OTHER].statuses[200] == 2 * HEALTH_SERIES_MAX + 1


def _shared(clock: Clock, bus: Bus | None = None, gateway_id: str = "gw_1") -> SharedHealth:
    return SharedHealth(bus or Bus(), gateway_id, lambda: ["eng_bad"], clock)


def test_a_slot_counts_once_and_only_while_it_is_young() -> None:
    """What is read again changes nothing; gateways add up; what is older than half an hour is let go."""
    clock = Clock()
    shared = _shared(clock)
    number = int(clock.now / SLOT_S) - 3
    slots = [
        Slot(
            gateway_id=gateway,
            number=number,
            series={"m": Series(statuses={200: 3, 503: 1}, first={10: 2})},
            failing=["eng_bad"],
        )
        for gateway in ("gw_1", "gw_2")
    ]
    for slot in [*slots, *slots]:
        shared.hear(slot)
    shared.hear(Slot(gateway_id="gw_1", number=number - 10 * SLOTS_KEPT))
    shared.hear(Slot(gateway_id="gw_1", number=number + 1000))
    readings = read(shared.moments())
    assert readings.recent.requests == 8
    assert readings.recent.per_s == pytest.approx(8 / 60)
    assert readings.half_hour.failed_share == 0.25
    assert readings.gateways == 2
    assert [(each.name, each.statuses) for each in readings.by_name] == [("m", {200: 6, 503: 2})]
    assert sum(readings.curves.per_s) * POINT_S == pytest.approx(8)
    assert shared.moments()[-2].failing == {"eng_bad": 2}
    clock.now += 2 * SLOTS_KEPT * SLOT_S
    shared.hear(Slot(gateway_id="gw_1", number=int(clock.now / SLOT_S)))
    assert read(shared.moments()).half_hour.requests == 0
    assert len(shared._moments) == 1


async def test_gateways_know_what_others_saw(nats_url: str) -> None:
    """A gateway that starts later has the history of those before it, and then hears what is new."""
    clock = Clock()
    clock.now = float(int(time.time() / SLOT_S) * SLOT_S - 100)
    first, second = Bus(), Bus()
    await first.connect(nats_url)
    await second.connect(nats_url)
    telling = _shared(clock, first, f"gw_{time.time_ns()}")
    hearing = _shared(clock, second, f"gw_{time.time_ns()}")
    watching: asyncio.Task[None] | None = None
    before = read(telling.moments()).half_hour.requests
    try:
        telling.window.note("shared", 200, 0.5, 0.1)
        clock.now += SLOT_S
        for slot in telling.window.take_ended():
            telling._unsent.append(slot)
        await telling._send()
        watching = asyncio.create_task(hearing.watch())
        clock.now += 3 * SLOT_S

        def heard() -> int:
            return sum(
                moment.series["shared"].statuses.get(200, 0)
                for moment in hearing.moments()
                if "shared" in moment.series
            )

        await eventually(lambda: heard() == 1)
        telling.window.note("shared", 200, 0.5, 0.1)
        clock.now += SLOT_S
        telling._unsent.extend(telling.window.take_ended())
        await telling._send()
        clock.now += 3 * SLOT_S
        await eventually(lambda: heard() == 2)
        assert before == 0
    finally:
        if watching is not None:
            watching.cancel()
        await first.close()
        await second.close()


async def test_requests_are_counted_by_what_became_of_them(rig: Rig) -> None:
    """Streams have a time to the first token, broken ones have failed with a reason; unknown models are refused."""
    window = rig.services.health.window
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True
    )
    assert [chunk async for chunk in stream]
    await rig.tenant.openai.chat.completions.create(model=BASE, messages=MESSAGES)
    answer = await rig.tenant.http.post(
        COMPLETIONS, json={"model": "no-such-model", "messages": MESSAGES}
    )
    assert answer.status_code == 404
    for engine in rig.engines:
        engine.behaviour = "break"
    body = {"model": BASE, "messages": MESSAGES, "stream": True}
    assert '"error"' in (await rig.tenant.http.post(COMPLETIONS, json=body)).text
    for engine in rig.engines:
        engine.behaviour = "unready"
    assert (await rig.tenant.http.post(COMPLETIONS, json=body)).status_code == 503
    assert (await rig.tenant.http.get("/river/v1/runs")).status_code == 200
    await rig.tenant.http.get("/healthz")

    window._number -= 1
    window.turn()
    counted = window.totals
    assert counted[BASE].statuses == {200: 2, STREAM_BROKEN: 1, 503: 1}
    assert sum(counted[BASE].first.values()) == 2, "of two streams, and of no other answer"
    assert counted["OpenAI API"].statuses == {404: 1}
    assert counted["River API"].statuses[200] >= 1
    slots = window.take_ended()  # Others may have ended by the clock, and been told already.
    failures = [failure for slot in slots for failure in slot.failures]
    told = {one.request_id: one for one in (*rig.services.health.failures(), *failures)}
    broken, unready = sorted(told.values(), key=lambda one: one.at)
    assert "lost" in broken.message
    assert (unready.status, unready.name, unready.route) == (503, BASE, COMPLETIONS)
    text = (await rig.tenant.http.get("/metrics")).text
    assert f'river_gateway_ended_requests_total{{model="{BASE}",outcome="failed"}} 2.0' in text
    assert f'river_gateway_first_token_seconds_count{{model="{BASE}"}} 2.0' in text


def test_counting_costs_next_to_nothing() -> None:
    """A request is counted in a few microseconds at most, on a machine that may be busy."""
    window = Window("gw_1")
    context = RequestContext(status=200, base_model="m", first_token_s=0.02)
    best = min(_seconds(window, context) for _ in range(20))
    assert best / 1000 < 6e-6


def _seconds(window: Window, context: RequestContext) -> float:
    begun = time.perf_counter()
    for _ in range(1000):
        window.count(context, COMPLETIONS, 0.3)
    return time.perf_counter() - begun
