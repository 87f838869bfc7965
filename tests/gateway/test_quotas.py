"""Limits: that no more is admitted than they say, by one gateway and by several together, and not much less."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quotas import STEP_S, World, admitted, principal

from river_client.wire import Limits
from river_gateway.errors import RateLimitedError
from river_gateway.limits import QUOTA_HOLD_S, QUOTA_TICK_S
from river_gateway.tenancy.auth import Principal
from river_gateway.tenancy.quotas import UNLIMITED, Quotas, Ticket, duration
from river_gateway.tenancy.shares import TokenBucket

LATE_S = QUOTA_HOLD_S + QUOTA_TICK_S


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- One gateway -----------------------------------------------------------------------------------------------------


@given(
    capacity=st.floats(1, 1000),
    per_s=st.floats(0.01, 100),
    draws=st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 500)), max_size=60),
)
def test_a_bucket_gives_what_it_holds_and_what_flows_in(
    capacity: float, per_s: float, draws: list[tuple[float, float]]
) -> None:
    """In any stretch of time no more is drawn than capacity and rate allow, and nothing that is there is refused."""
    now = 0.0
    bucket = TokenBucket(capacity, per_s, now)
    drawn: list[tuple[float, float]] = []
    for wait_s, amount in draws:
        now += wait_s
        if bucket.level(now) >= amount:
            bucket.draw(now, amount)
            drawn.append((now, amount))
        elif amount <= capacity:
            later = now + bucket.wait_s(now, amount)
            assert bucket.wait_s(now, amount) > 0
            assert TokenBucket.level(bucket, now) + (later - now) * per_s >= amount - 1e-6
    for start in range(len(drawn)):
        total = 0.0
        for at, amount in drawn[start:]:
            total += amount
            assert total <= capacity + per_s * (at - drawn[start][0]) + 1e-6


@given(
    limit=st.integers(1, 5000),
    requests=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 6000), st.integers(0, 6000)), max_size=80
    ),
)
def test_tokens_are_settled_by_fact(limit: int, requests: list[tuple[float, int, int]]) -> None:
    """Whatever was estimated, facts stay within the limit but for the last request's excess, which is paid back."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    who = principal(Limits(tokens_per_minute=limit))
    used: list[tuple[float, int]] = []
    excess = 0
    for wait_s, estimate, fact in requests:
        clock.now += wait_s
        ticket = admitted(quotas, who, estimate)
        if ticket is not None:
            ticket.settle(fact)
            ticket.settle(fact + 1)
            used.append((clock.now, fact))
            excess = max(excess, fact - min(estimate, limit))
    for start in range(len(used)):
        total = sum(fact for _, fact in used[start:])
        seconds = used[-1][0] - used[start][0] if used else 0.0
        assert total <= limit + limit / 60 * seconds + excess + 1e-3


def test_one_gateway_keeps_every_limit_exactly() -> None:
    """Alone, a gateway admits the minute's allowance and then what flows in, to the request."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    who = principal(Limits(requests_per_minute=60))
    assert sum(admitted(quotas, who) is not None for _ in range(100)) == 60
    with pytest.raises(RateLimitedError) as refused:
        quotas.admit(who, 0)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    clock.now += 2.5
    assert sum(admitted(quotas, who) is not None for _ in range(100)) == 2


def test_concurrent_requests() -> None:
    """As many as allowed at once; a settled one makes room, once."""
    quotas = Quotas(clock=Clock())
    who = principal(Limits(concurrent_requests=2))
    first, second = quotas.admit(who, 5), quotas.admit(who, 5)
    with pytest.raises(RateLimitedError, match=r"API key key_1 may use 2 concurrent requests"):
        quotas.admit(who, 5)
    first.settle(3)
    first.settle(3)
    third = quotas.admit(who, 5)
    assert admitted(quotas, who) is None
    second.settle(0)
    third.settle(0)
    with pytest.raises(ZeroDivisionError), quotas.admit(who, 1):
        raise ZeroDivisionError
    assert quotas.admit(who, 5)
    assert quotas.admit(who, 5)


def test_a_tenant_s_limit_is_over_all_its_keys() -> None:
    """Two keys share what their tenant has, and each keeps within its own limit; a refusal says whose it was."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    tenant = Limits(requests_per_minute=5)
    one = principal(Limits(requests_per_minute=3), tenant)
    other = principal(None, tenant, key_id="key_2")
    assert sum(admitted(quotas, one) is not None for _ in range(10)) == 3
    with pytest.raises(RateLimitedError, match=r"key_1 may use 3 requests per minute"):
        quotas.admit(one, 0)
    assert sum(admitted(quotas, other) is not None for _ in range(10)) == 2
    with pytest.raises(RateLimitedError, match=r"tenant ten_1 may use 5 requests per minute"):
        quotas.admit(other, 0)


def test_more_than_a_minute_s_tokens_are_let_in_when_the_bucket_is_full() -> None:
    """An estimate above the limit is no dead end: it waits for the whole allowance, and owes what it used."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    who = principal(Limits(tokens_per_minute=600))
    quotas.admit(who, 5000).settle(1200)
    with pytest.raises(RateLimitedError) as refused:
        quotas.admit(who, 10)
    assert refused.value.openai_type == "tokens"
    assert refused.value.retry_after_s == pytest.approx(61.0)
    assert "600 tokens per minute and 10 were asked for" in refused.value.message
    clock.now += 61.0
    assert admitted(quotas, who, 10)


def test_what_is_not_used_is_given_back() -> None:
    """A request that used less than it reserved leaves the rest to the next one."""
    quotas = Quotas(clock=Clock())
    who = principal(Limits(tokens_per_minute=100))
    ticket = quotas.admit(who, 90)
    assert admitted(quotas, who, 90) is None
    ticket.settle(5)
    assert admitted(quotas, who, 90) is not None


def test_headers() -> None:
    """OpenAI's six, of whichever of key and tenant has less left; none without limits."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    who = principal(
        Limits(requests_per_minute=60, tokens_per_minute=6000), Limits(tokens_per_minute=1000)
    )
    ticket = quotas.admit(who, 500)
    assert dict(ticket.headers) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"500",
        b"x-ratelimit-reset-tokens": b"30s",
    }
    ticket.settle(100)
    assert dict(ticket.headers)[b"x-ratelimit-remaining-tokens"] == b"900"
    assert quotas.admit(principal(), 10**9) is UNLIMITED
    assert UNLIMITED.headers == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0115, "12ms"),
        (0.9999, "1s"),
        (8.64, "8.64s"),
        (60, "1m0s"),
        (372.5, "6m12.5s"),
        (3600, "1h0m0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Times are written as OpenAI writes them, rounded up to a millisecond."""
    assert duration(seconds) == text


def test_a_changed_limit_counts_at_once() -> None:
    """What has been used of the old limit counts for the new one in proportion."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    for _ in range(50):
        quotas.admit(principal(Limits(requests_per_minute=100)), 0)
    higher = principal(Limits(requests_per_minute=200))
    assert sum(admitted(quotas, higher) is not None for _ in range(300)) == 100
    clock.now += 30
    lower = principal(Limits(requests_per_minute=10))
    assert sum(admitted(quotas, lower) is not None for _ in range(300)) == 5
    assert quotas.admit(principal(), 0) is UNLIMITED


def test_owners_are_forgotten_when_nothing_is_to_be_remembered() -> None:
    """Memory is for limits in use: one whose bucket is full again is gone, one with a request in progress is not."""
    clock = Clock()
    quotas = Quotas(clock=clock)
    for number in range(50):
        quotas.admit(principal(Limits(requests_per_minute=60), key_id=f"key_{number}"), 0).settle(0)
    busy = quotas.admit(principal(Limits(tokens_per_minute=60), key_id="key_busy"), 9)
    clock.now += 120
    for _ in range(3):
        quotas.tick(connected=True)
    assert set(quotas._owners) == {"key_busy"}
    busy.settle(9)


# ---- Several gateways ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 5),
    limit=st.sampled_from([1, 3, 20, 600]),
    loads=st.lists(
        st.lists(st.sampled_from([0.0, 0.02, 1.0, 4.0, 1000.0]), min_size=5, max_size=5),
        min_size=2,
        max_size=4,
    ),
)
def test_together_they_keep_the_limit(
    seed: int, count: int, limit: int, loads: list[list[float]]
) -> None:
    """Several gateways under any shifting load admit together no more than the module says, in any stretch of time."""
    world = World(count, seed=seed)
    chance = random.Random(seed)
    who = principal(Limits(requests_per_minute=limit))
    at: list[float] = []
    for load in loads:
        for _ in range(200):
            world.step()
            for quotas, times_limit in zip(world.gateways, load, strict=False):
                # At least one request now and then, whatever the limit.
                asked = int(times_limit * max(limit / 60 * STEP_S, 0.2) + chance.random())
                while asked > 0 and admitted(quotas, who):
                    at.append(world.now)
                    asked -= 1
    stride = max(1, len(at) // 200)
    for start in range(0, len(at), stride):
        for end in [*range(start, len(at), stride), len(at) - 1]:
            seconds = at[end] - at[start]
            bound = limit * (1 + (seconds + LATE_S) / 60) + count - 1
            assert end - start + 1 <= math.floor(bound + 1e-6)


@pytest.mark.parametrize("load", [[4.0, 0.0, 0.0], [2.0, 2.0, 2.0], [3.0, 0.3, 0.01]], ids=str)
def test_together_they_use_the_limit(load: list[float]) -> None:
    """Wherever the load is, what flows in is used: at least 95 % of it, after the bucket has been emptied."""
    limit = 6000
    world = World(3)
    chance = random.Random(1)
    who = principal(Limits(requests_per_minute=limit))
    count = 0
    for step in range(3000):
        world.step()
        for quotas, times_limit in zip(world.gateways, load, strict=True):
            for _ in range(int(times_limit * limit / 60 * STEP_S + chance.random())):
                if admitted(quotas, who) and step >= 1000:
                    count += 1
                if step < 500:
                    for _ in range(10):
                        admitted(quotas, who)
    assert 0.95 * limit / 60 * 20 <= count <= limit / 60 * (20 + LATE_S) + 2


def test_a_burst_at_a_newcomer_is_served() -> None:
    """A gateway that has not used a limit before gets most of a whole bucket within a fifth of a second."""
    world = World(3)
    who = principal(Limits(requests_per_minute=600))
    count = 0
    for _ in range(20):
        world.step()
        count += sum(admitted(world.gateways[1], who) is not None for _ in range(600))
    assert count >= 550


def test_what_is_drawn_and_not_used_is_put_back() -> None:
    """A gateway with one request now and then does not keep what another one needs."""
    world = World(2)
    who = principal(Limits(requests_per_minute=600))
    assert admitted(world.gateways[0], who)
    world.go_on(2.0)
    count = 0
    for _ in range(50):
        world.step()
        count += _flood(world, 1, who)
    assert count >= 590


def test_concurrency_is_kept_together() -> None:
    """Slots move to where requests are; at most one too many for each further gateway; most of the limit is used."""
    world = World(3, seed=3)
    chance = random.Random(5)
    who = principal(Limits(concurrent_requests=10))
    running: list[tuple[float, int]] = []
    tickets: dict[int, Ticket] = {}
    counts: list[int] = []
    for step in range(3000):
        world.step()
        for until, key in list(running):
            if until <= world.now:
                running.remove((until, key))
                tickets.pop(key).settle(0)
        wanted = world.gateways[step // 1000]
        for quotas in (wanted, chance.choice(world.gateways)):
            ticket = admitted(quotas, who)
            if ticket is not None:
                key = len(tickets) + step * 10
                tickets[key] = ticket
                running.append((world.now + chance.random(), key))
        counts.append(len(running))
    assert 10 <= max(counts) <= 12
    assert sum(counts) / len(counts) >= 8


def test_whoever_is_cut_off_goes_on_with_its_part() -> None:
    """Without NATS each gateway admits its part of the limit, until all is back, and then all admit the limit."""
    limit = 600
    world = World(3)
    who = principal(Limits(requests_per_minute=limit))
    _exhaust(world, who)
    world.cut = {0, 1, 2}
    world.go_on(2.0)
    before = [_flood(world, number, who) for number in range(3)]
    world.go_on(6.0)
    after = [_flood(world, number, who) for number in range(3)]
    assert sum(before) <= limit / 60 * (2.0 + LATE_S) + 2
    assert all(18 <= count <= 22 for count in after)
    world.cut = set()
    world.go_on(1.0)
    _exhaust(world, who)
    count = 0
    for _ in range(500):
        world.step()
        count += sum(_flood(world, number, who) for number in range(3))
    assert limit / 60 * 4.5 <= count <= limit / 60 * (5 + LATE_S) + 2


def test_a_gateway_that_is_gone_leaves_its_part() -> None:
    """What a dead gateway had, slots too, is there for the others some seconds later."""
    world = World(2)
    who = principal(Limits(concurrent_requests=4))
    for _ in range(30):
        world.step()
        admitted(world.gateways[0], who)
    assert admitted(world.gateways[1], who) is None
    world.gateways[1].hear(world.gateways[0].farewell())
    assert sum(admitted(world.gateways[1], who) is not None for _ in range(9)) == 4


def test_a_newcomer_is_told_what_is_left() -> None:
    """A gateway that starts when a limit is used up does not give it out again."""
    world = World(2)
    who = principal(Limits(requests_per_minute=120))
    _exhaust(world, who)
    newcomer = world.start()
    world.go_on(0.2)
    assert sum(admitted(newcomer, who) is not None for _ in range(200)) <= 2


def test_what_was_missed_is_asked_for() -> None:
    """An announcement that is lost is noticed by its number, and what it said is learnt."""
    world = World(2)
    one, other = world.gateways
    who = principal(Limits(requests_per_minute=120))
    for _ in range(60):
        admitted(one, who)
    one.announcements()
    world.go_on(2.0)
    seen = other._owners["key_1"].requests
    assert seen is not None
    known = one._owners["key_1"].requests
    assert known is not None
    assert seen.remaining(world.now) == pytest.approx(known.remaining(world.now), abs=1.0)


def _exhaust(world: World, who: Principal) -> None:
    for _ in range(60):
        world.step()
        for number in range(world.count):
            _flood(world, number, who)


def _flood(world: World, number: int, who: Principal) -> int:
    """How many requests one gateway admits now."""
    count = 0
    while admitted(world.gateways[number], who):
        count += 1
    return count
