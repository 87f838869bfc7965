"""Which engine answers: the pure choice, the breakers, and what the fleet remembers."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from support.stand_ins import BASE, StandInEngine

from river_engine.protocol import EngineRecord
from river_gateway import limits
from river_gateway.bus import Bus
from river_gateway.engines.fleet import Fleet
from river_gateway.engines.fleet_metrics import FleetMetrics
from river_gateway.engines.health import Breaker
from river_gateway.engines.registry import Engines
from river_gateway.engines.routing import (
    EngineState,
    Question,
    choose_engine,
    choose_second,
)

BUSY_TOKENS = 100 * limits.ROUTING_SLACK_TOKENS


def state(
    name: str,
    *,
    tokens: int = 0,
    holds: bool = False,
    loading: bool = False,
    failing: bool = False,
    draining: bool = False,
) -> EngineState:
    """An engine in a snapshot."""
    record = StandInEngine(name).record(draining=draining)
    return EngineState(record, tokens, holds, loading, failing)


def chosen(engines: list[EngineState], question: Question, excluded: set[str] | None = None) -> str:
    """The chosen engine's name; empty if there is none."""
    engine = choose_engine(engines, question, excluded=excluded or set())
    return engine.record.engine_id if engine else ""


# ---- The choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ([], ""),
        ([state("a", draining=True)], ""),
        ([state("a", draining=True), state("b", tokens=BUSY_TOKENS)], "b"),
        ([state("a", failing=True)], "a"),
        ([state("a", failing=True), state("b", tokens=BUSY_TOKENS)], "b"),
        ([state("a", holds=True), state("b")], "a"),
        ([state("a", holds=True, failing=True), state("b")], "b"),
        ([state("a", holds=True, draining=True), state("b")], "b"),
        ([state("a", holds=True, tokens=BUSY_TOKENS), state("b", holds=True)], "b"),
        ([state("a", holds=True, tokens=BUSY_TOKENS), state("b"), state("c")], "bc"),
        ([state("a", holds=True, tokens=BUSY_TOKENS), state("b", tokens=BUSY_TOKENS)], "a"),
        ([state("a", holds=True, tokens=BUSY_TOKENS), state("b")], "b"),
        ([state("a", holds=True, tokens=limits.ROUTING_CROWDED_SLACK_TOKENS), state("b")], "a"),
        ([state("a", holds=True, loading=True, tokens=BUSY_TOKENS), state("b")], "a"),
    ],
    ids=[
        "none",
        "draining",
        "draining before busy",
        "failing is better than none",
        "failing is worse than busy",
        "the holder",
        "a failing holder",
        "a draining holder",
        "the idle holder",
        "a crowded holder",
        "all crowded",
        "one of two engines crowded",
        "little to do is no crowd",
        "loading is waited for",
    ],
)
def test_the_order_of_reasons(engines: list[EngineState], expected: str) -> None:
    """Who may answer, who holds the adapter, who has room."""
    name = chosen(engines, Question(BASE, "x", b"k"))
    assert name == expected or (name and name in expected)


def test_excluded_engines_and_other_bases_are_not_asked() -> None:
    """An engine that has been tried, or has another base model, is no engine."""
    engines = [state("a"), state("b")]
    assert chosen(engines, Question(BASE), {"a"}) == "b"
    assert chosen(engines, Question(BASE), {"a", "b"}) == ""
    assert chosen(engines, Question("other")) == ""


def test_without_affinity_the_least_loaded_answers() -> None:
    """Ties go by name, so that an idle stack keeps its cache in one place."""
    engines = [state("b", tokens=2), state("c", tokens=1), state("a", tokens=1)]
    assert chosen(engines, Question(BASE)) == "a"


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ([state("a", holds=True)], ""),
        ([state("a", holds=True), state("b")], ""),
        ([state("a", holds=True), state("b", holds=True)], "b"),
        ([state("a", holds=True), state("b", holds=True, loading=True)], ""),
        ([state("a", holds=True), state("b", holds=True, failing=True)], ""),
        ([state("a", holds=True), state("b", holds=True, draining=True)], ""),
        ([state("a", holds=True), state("b", holds=True, tokens=BUSY_TOKENS)], ""),
        ([state("a", holds=True, tokens=BUSY_TOKENS), state("b", holds=True)], "b"),
    ],
    ids=[
        "nobody else",
        "would have to load",
        "another holder",
        "loading",
        "failing",
        "draining",
        "busy",
        "idle",
    ],
)
def test_a_copy_goes_only_where_it_costs_little(engines: list[EngineState], expected: str) -> None:
    """To an engine that could begin at once; else the request waits for the one that has it."""
    engine = choose_second(engines, Question(BASE, "x", b"k"), excluded={"a"})
    assert (engine.engine_id if engine else "") == expected


snapshots = st.lists(
    st.builds(
        lambda tokens, holds, failing, draining: (tokens, holds, failing, draining),
        st.integers(0, 10**6) | st.just(0),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=12,
).map(
    lambda rows: [
        state(f"e{index}", tokens=tokens, holds=holds, failing=failing, draining=draining)
        for index, (tokens, holds, failing, draining) in enumerate(rows)
    ]
)
questions = st.builds(Question, st.just(BASE), st.none() | st.just("x"), st.binary(max_size=8))
exclusions = st.sets(st.integers(0, 11).map(lambda index: f"e{index}"))


@given(engines=snapshots, question=questions, excluded=exclusions)
def test_only_those_that_can_are_asked(
    engines: list[EngineState], question: Question, excluded: set[str]
) -> None:
    """Somebody is, if there is anybody; never one that drains or was tried, and a failing one only if all fail."""
    engine = choose_engine(engines, question, excluded=excluded)
    able = [
        candidate
        for candidate in engines
        if not candidate.record.draining and candidate.engine_id not in excluded
    ]
    if engine is None:
        assert not able
        return
    assert engine in able
    assert not engine.failing or all(candidate.failing for candidate in able)


@given(engines=snapshots, question=questions, excluded=exclusions)
def test_a_copy_is_never_a_burden(
    engines: list[EngineState], question: Question, excluded: set[str]
) -> None:
    """Whoever gets one could have been asked first, holds what it takes, and has not more to do than others."""
    engine = choose_second(engines, question, excluded=excluded)
    if engine is None:
        return
    assert engine.engine_id not in excluded
    assert not engine.failing
    assert not engine.record.draining
    ready = [other for other in engines if not (other.failing or other.record.draining)]
    if question.adapter is not None:
        assert engine.holds
        ready = [other for other in ready if other.holds]
    mean_tokens = sum(other.outstanding_tokens for other in ready) / len(ready)
    slack = limits.ROUTING_SLACK_TOKENS
    assert engine.outstanding_tokens <= limits.ROUTING_ROOM_FACTOR * mean_tokens + slack


@given(engines=snapshots, question=questions, data=st.data())
def test_the_order_of_a_snapshot_says_nothing(
    engines: list[EngineState], question: Question, data: st.DataObject
) -> None:
    """Every gateway decides the same, whatever order it heard of the engines in."""
    shuffled = data.draw(st.permutations(engines))
    assert choose_engine(shuffled, question) == choose_engine(engines, question)


@given(engines=snapshots, question=questions)
def test_nobody_is_overloaded(engines: list[EngineState], question: Question) -> None:
    """The chosen engine has at most its share and a bit of what those have that were left to choose from."""
    engine = choose_engine(engines, question)
    if engine is None:
        return
    able = [candidate for candidate in engines if not candidate.record.draining]
    able = [candidate for candidate in able if candidate.failing == engine.failing]
    if question.adapter is not None:
        able = [candidate for candidate in able if candidate.holds == engine.holds]
    mean_tokens = sum(candidate.outstanding_tokens for candidate in able) / len(able)
    room_tokens = limits.ROUTING_ROOM_FACTOR * mean_tokens + limits.ROUTING_SLACK_TOKENS
    assert engine.outstanding_tokens <= room_tokens


@given(engines=snapshots, question=questions)
def test_an_adapter_is_loaded_again_only_where_that_is_less_crowded(
    engines: list[EngineState], question: Question
) -> None:
    """Whoever is chosen though others hold the adapter has less to do than every one of them."""
    engine = choose_engine(engines, question)
    if engine is None or question.adapter is None or engine.holds:
        return
    holders = [
        candidate
        for candidate in engines
        if candidate.holds and not candidate.record.draining and candidate.failing == engine.failing
    ]
    assert all(engine.outstanding_tokens < holder.outstanding_tokens for holder in holders)


@given(
    engines=snapshots,
    question=questions,
    tokens=st.integers(0, 10**6),
    data=st.data(),
)
def test_a_leaving_engine_moves_only_its_own(
    engines: list[EngineState], question: Question, tokens: int, data: st.DataObject
) -> None:
    """With equal loads, what went elsewhere before goes there still."""
    engines = [state(engine.engine_id, tokens=tokens, failing=engine.failing) for engine in engines]
    before = choose_engine(engines, question)
    if before is None or not question.adapter:
        return
    leaving = data.draw(st.sampled_from(engines))
    left = [engine for engine in engines if engine is not leaving]
    assert leaving == before or choose_engine(left, question) == before


def test_adapters_spread_and_stay_put() -> None:
    """Thousands of adapters lie evenly, and an engine that joins or leaves moves only its own share of them."""
    engines = [state(f"e{index}") for index in range(8)]
    questions = [Question(BASE, f"run_{index}@1") for index in range(4000)]
    before = [chosen(engines, question) for question in questions]
    counts = Counter(before)
    assert len(counts) == 8
    assert max(counts.values()) < 1.2 * 4000 / 8
    left = [chosen(engines[:-1], question) for question in questions]
    assert all(old in (new, "e7") for old, new in zip(before, left, strict=True))
    joined = [chosen([*engines, state("e8")], question) for question in questions]
    moved = [new for old, new in zip(before, joined, strict=True) if old != new]
    assert set(moved) == {"e8"}
    assert len(moved) < 1.3 * 4000 / 9


def test_requests_that_share_a_beginning_share_an_engine() -> None:
    """Until it is crowded; other beginnings go elsewhere."""
    engines = [state(f"e{index}") for index in range(4)]
    home = chosen(engines, Question(BASE, None, b"tenant system prompt"))
    assert home == chosen(engines, Question(BASE, None, b"tenant system prompt"))
    assert len({chosen(engines, Question(BASE, None, b"%d" % index)) for index in range(50)}) == 4
    busy = [
        state(engine.record.engine_id, tokens=BUSY_TOKENS * (engine.record.engine_id == home))
        for engine in engines
    ]
    assert chosen(busy, Question(BASE, None, b"tenant system prompt")) != home


# ---- Breakers --------------------------------------------------------------------------------------------------------


def test_a_breaker_opens_and_one_request_tries_again() -> None:
    """A few failures in a row open it; after a pause one request may try; each failure doubles the pause."""
    breaker, now, pause_s = Breaker(), 100.0, limits.BREAKER_PAUSE_MIN_S
    for _ in range(limits.BREAKER_FAILURES):
        assert not breaker.is_open(now)
        breaker.fail(now)
    while pause_s <= limits.BREAKER_PAUSE_MAX_S:
        assert breaker.is_open(now + 0.99 * pause_s)
        now += pause_s
        assert not breaker.is_open(now)
        breaker.begin(now)
        assert breaker.is_open(now)
        breaker.fail(now)
        pause_s *= 2
    assert not breaker.is_open(now + limits.BREAKER_PAUSE_MAX_S)
    breaker.begin(now + limits.BREAKER_PAUSE_MAX_S)
    breaker.succeed()
    assert not breaker.is_open(now)


def test_a_try_that_says_nothing_lets_another_try() -> None:
    """A client that leaves in the middle of the trying request does not keep the breaker open for ever."""
    breaker = Breaker()
    for _ in range(limits.BREAKER_FAILURES):
        breaker.fail(0.0)
    breaker.begin(limits.BREAKER_PAUSE_MIN_S)
    breaker.give_up()
    assert not breaker.is_open(limits.BREAKER_PAUSE_MIN_S)


def test_successes_in_between_keep_a_breaker_closed() -> None:
    """Only failures in a row count."""
    breaker = Breaker()
    for _ in range(10 * limits.BREAKER_FAILURES):
        breaker.fail(0.0)
        breaker.succeed()
    assert not breaker.is_open(0.0)


# ---- The fleet -------------------------------------------------------------------------------------------------------


class StillEngines(Engines):
    """A registry whose records are given."""

    def __init__(self, *records: EngineRecord) -> None:
        super().__init__(Bus())
        self.records = list(records)

    def alive(self, base_model: str | None = None) -> list[EngineRecord]:
        return [record for record in self.records if base_model in (None, record.base_model)]


def _fleet(*names: str) -> tuple[Fleet, StillEngines, list[float]]:
    engines = StillEngines(*(StandInEngine(name).record() for name in names))
    now = [time.monotonic()]
    return Fleet(engines, lambda: now[0]), engines, now


def _ask(fleet: Fleet, question: Question) -> str:
    record = fleet.choose(question)
    assert record is not None
    return record.engine_id


def test_first_requests_for_an_adapter_go_to_one_place() -> None:
    """Though that engine fills up meanwhile and has not reported the adapter yet; later its report decides."""
    fleet, engines, now = _fleet("a", "b", "c", "d")
    question = Question(BASE, "run_1@1")
    home = _ask(fleet, question)
    with closing(fleet.visit(home, BUSY_TOKENS)):
        assert {_ask(fleet, question) for _ in range(20)} == {home}
    now[0] += limits.PLACEMENT_REMEMBERED_S
    other = next(record.engine_id for record in engines.records if record.engine_id != home)
    engines.records = [
        StandInEngine(record.engine_id).record(
            resident=["run_1@1"] if record.engine_id == other else []
        )
        for record in engines.records
    ]
    assert _ask(fleet, question) == other


def test_a_place_that_says_it_is_loading_is_believed() -> None:
    """However long it takes: nobody else is asked to load the adapter meanwhile, crowded as the place may be."""
    fleet, engines, now = _fleet("a", "b", "c")
    question = Question(BASE, "run_1@1")
    home = _ask(fleet, question)
    now[0] += 10 * limits.PLACEMENT_REMEMBERED_S
    engines.records = [
        StandInEngine(name).record(loading=["run_1@1"] if name == home else []) for name in "abc"
    ]
    with closing(fleet.visit(home, BUSY_TOKENS)):
        assert _ask(fleet, question) == home
    assert fleet.placed == 1


def test_a_place_where_loading_failed_is_forgotten() -> None:
    """The next request may go elsewhere."""
    fleet, _, _ = _fleet("a", "b")
    question = Question(BASE, "run_1@1")
    home = _ask(fleet, question)
    assert [state.holds for state in fleet.snapshot(question)].count(True) == 1
    fleet.failed(home, "run_1@1")
    assert not any(state.holds for state in fleet.snapshot(question))


def test_what_is_outstanding_here_counts_at_once() -> None:
    """The engine's own report is seconds old."""
    fleet, _, _ = _fleet("a", "b")
    assert _ask(fleet, Question(BASE)) == "a"
    with closing(fleet.visit("a", 10)):
        assert _ask(fleet, Question(BASE)) == "b"
        assert fleet.outstanding_tokens() == {"a": 10}
    assert fleet.outstanding_tokens() == {}
    assert _ask(fleet, Question(BASE)) == "a"


def test_a_failing_engine_is_left_alone_for_a_while() -> None:
    """And comes back with its first success."""
    fleet, _, now = _fleet("a", "b")
    for _ in range(limits.BREAKER_FAILURES):
        fleet.failed("a", None)
    assert _ask(fleet, Question(BASE)) == "b"
    now[0] += limits.BREAKER_PAUSE_MIN_S
    with closing(fleet.visit("a", 0)):
        assert _ask(fleet, Question(BASE)) == "b"
        fleet.succeeded("a")
    assert _ask(fleet, Question(BASE)) == "a"


def test_what_prometheus_sees_of_engines() -> None:
    """Tokens outstanding and failures of those that are there, and how often adapters got a place."""
    fleet, engines, _ = _fleet("a", "b")
    registry = CollectorRegistry()
    registry.register(FleetMetrics(fleet))
    _ask(fleet, Question(BASE, "run_1@1"))
    for _ in range(limits.BREAKER_FAILURES):
        fleet.failed("b", None)
    with closing(fleet.visit("a", 10)):
        text = generate_latest(registry).decode()
    assert 'river_gateway_engine_outstanding_tokens{engine="a"} 10.0' in text
    assert 'river_gateway_engine_failing{engine="a"} 0.0' in text
    assert 'river_gateway_engine_failing{engine="b"} 1.0' in text
    assert "river_gateway_adapters_placed_total 1.0" in text
    engines.records = []
    assert "engine=" not in generate_latest(registry).decode()
