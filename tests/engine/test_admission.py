"""Whose turn it is, on a clock of its own: rules that always hold, and nobody starves however the others flood."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from river_engine.admission import Admission, QueueFullError, Turn, Wait

from .machine import SLICE_S, STEP_S, Asked, Machine, bounds, turn

# ---- Rules that always hold ------------------------------------------------------------------------------------------

TENANTS = ["ann", "bob", "cid"]
VERSIONS = [None, "a@1", "a@2", "b@1", "c@1"]


class AnyRequests(RuleBasedStateMachine):
    """Requests come and go in any order, with any sizes."""

    @initialize(slots=st.integers(1, 3), sequences=st.integers(1, 9), tokens=st.integers(1, 900))
    def start(self, slots: int, sequences: int, tokens: int) -> None:
        self.bounds = bounds(slots=slots, sequences=sequences, tokens=tokens, waiting=60)
        self.admission = Admission(self.bounds)
        self.now = 0.0
        self.fetching: list[Turn] = []
        self.waiting: list[Turn] = []
        self.inside: list[Turn] = []

    @rule(
        tenant=st.sampled_from(TENANTS),
        version=st.sampled_from(VERSIONS),
        count=st.integers(1, 4),
        prompt_tokens=st.integers(1, 300),
        sequences=st.integers(1, 12),
        here=st.booleans(),
    )
    def ask(
        self,
        tenant: str,
        version: str | None,
        count: int,
        prompt_tokens: int,
        sequences: int,
        *,
        here: bool,
    ) -> None:
        turns = [
            turn(tenant, version, prompt_tokens=prompt_tokens, sequences=sequences)
            for _ in range(count)
        ]
        try:
            self.admission.arrive(turns, self.now, ready=here)
        except QueueFullError:
            assert self.waiting or self.fetching
            return
        (self.waiting if here else self.fetching).extend(turns)
        self.advance()

    @precondition(lambda self: self.fetching)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        fetched = data.draw(st.sampled_from(self.fetching))
        self.fetching.remove(fetched)
        self.waiting.append(fetched)
        self.admission.fetched([fetched])
        self.advance()

    @precondition(lambda self: self.fetching or self.waiting or self.inside)
    @rule(data=st.data(), produced=st.integers(0, 50))
    def end(self, data: st.DataObject, produced: int) -> None:
        ending = data.draw(st.sampled_from(self.fetching + self.waiting + self.inside))
        ending.produced = produced if ending.inside else 0
        for turns in (self.fetching, self.waiting, self.inside):
            if ending in turns:
                turns.remove(ending)
        self.admission.leave(ending)
        self.advance()

    @rule(seconds=st.floats(0.0, 1.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def advance(self) -> None:
        for admitted in self.admission.advance(self.now):
            earlier = [
                other
                for other in self.waiting
                if (other.tenant, other.version) == (admitted.tenant, admitted.version)
            ]
            assert earlier[0] is admitted, "first come, first served within a tenant and version"
            self.waiting.remove(admitted)
            self.inside.append(admitted)

    @invariant()
    def versions_inside_are_bounded(self) -> None:
        inside = {turn.version for turn in self.inside} - {None}
        assert len(inside) <= self.admission.slots_used() <= self.bounds.slots

    @invariant()
    def room_is_bounded(self) -> None:
        half = max(1, self.bounds.sequences // 2)
        assert sum(min(turn.sequences, half) for turn in self.inside) <= self.bounds.sequences
        assert sum(turn.tokens for turn in self.inside) <= self.bounds.tokens

    @invariant()
    def nothing_is_left_undone(self) -> None:
        """Whoever waits for a slot finds all taken, whoever waits for room finds little of it."""
        waiting = self.admission.waiting()
        assert waiting[Wait.ADAPTER] == len(self.fetching)
        assert sum(waiting.values()) == len(self.waiting) + len(self.fetching)
        assert self.admission.turns_inside() == len(self.inside)
        if waiting[Wait.SLOT]:
            assert self.admission.slots_used() == self.bounds.slots
        if waiting[Wait.DRAIN]:
            assert waiting[Wait.SLOT], "nobody has to drain for nothing"
        if waiting[Wait.ROOM]:
            half = max(1, self.bounds.sequences // 2)
            sequences = sum(min(turn.sequences, half) for turn in self.inside)
            tokens = sum(turn.tokens for turn in self.inside)
            assert (
                sequences >= self.bounds.sequences * 3 / 8 or tokens >= self.bounds.tokens * 3 / 8
            )
        assert not self.waiting or self.inside

    @invariant()
    def what_is_left_is_known(self) -> None:
        asked = self.fetching + self.waiting + self.inside
        left = sum(turn.outstanding_tokens for turn in asked)
        assert self.admission.outstanding_tokens() == left

    def teardown(self) -> None:
        """Everybody gets in, if only those inside come to an end."""
        self.admission.fetched(self.fetching)
        self.waiting += self.fetching
        self.advance()
        while self.inside:
            self.now += SLICE_S / 3
            self.admission.leave(self.inside.pop(0))
            self.advance()
        assert not self.waiting
        assert self.admission.is_idle()
        assert self.admission.slots_used() == 0 or not self.admission.advance(self.now)
        assert self.admission.slots_used() == 0


AnyRequests.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyRequests = AnyRequests.TestCase


@pytest.fixture
def machine() -> Machine:
    return Machine(Admission(bounds()))


SLICE_STEPS = round(SLICE_S / STEP_S)


# ---- Tenants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "ann@1"], ids=["base", "adapter"])
@pytest.mark.parametrize("length", [20, 400], ids=["short", "long"])
def test_a_flood_leaves_another_s_p99_within_twice(
    machine: Machine, version: str | None, length: int
) -> None:
    """With 200 requests of Bob's there at all times, long or short, 99 of 100 of Ann's take at most twice as long."""
    alone = machine.answer(machine.ask("ann", version), within=100)
    machine.flood("bob", None, 200, length=length)
    machine.run(1000)
    steps = sorted(machine.answer(machine.ask("ann", version), within=1000) for _ in range(100))
    assert alone == 20
    assert steps[98] <= 2 * alone


def test_tenants_are_served_alike(machine: Machine) -> None:
    """In tokens read and produced, whatever their requests' sizes, and however long they said answers might be."""
    machine.flood("ann", None, 100, length=10)
    machine.flood("bob", None, 100, length=100, completion_tokens_max=100_000)
    machine.flood("cid", None, 100, length=30, sequences=4)
    machine.run(2000)
    machine.served.clear()
    machine.run(20_000)
    smallest, largest = min(machine.served.values()), max(machine.served.values())
    assert len(machine.served) == 3
    assert largest < 1.25 * smallest, machine.served


def test_a_tenant_that_was_away_has_saved_nothing(machine: Machine) -> None:
    """Coming back after a long time, it shares from then on: it does not get what it did not use."""
    machine.answer(machine.ask("bob"), within=100)
    machine.flood("ann", None, 100)
    machine.run(10_000)
    machine.flood("bob", None, 100)
    machine.served.clear()
    machine.run(1000)
    assert machine.served["ann"] > 0.4 * machine.served.total()


def test_a_large_request_is_not_passed_for_ever(machine: Machine) -> None:
    """Many samples at once get in although small requests would fit in between all the time."""
    for name in ("ann", "bob", "cid"):
        machine.flood(name, None, 50, length=7)
    machine.run(50)
    machine.answer(machine.ask("dan", length=20, sequences=16), within=100)


def test_newcomers_do_not_keep_a_tenant_waiting(machine: Machine) -> None:
    """Tenants that come once, one after another without end, do not starve one that has been served much."""
    machine.flood("ann", None, 16)
    machine.run(500)
    for number in range(100):
        machine.ask(f"new-{number}", length=20)
    before = machine.served["ann"]
    for number in range(100, 2000):
        machine.ask(f"new-{number}", length=20)
        machine.run(1)
    assert machine.served["ann"] - before > 200


def cancel(machine: Machine, asked: list[Asked]) -> None:
    """Their clients leave."""
    for one in asked:
        machine.admission.leave(one.turn)
        if one in machine.running:
            machine.running.remove(one)
        else:
            del machine.waiting[one.turn]
    machine._let_in()


def test_a_newcomer_is_not_behind_those_who_cancelled() -> None:
    """What was guessed of requests that then got nothing was served to nobody, and puts nobody back."""
    machine = Machine(Admission(bounds(sequences=1)))
    asked = [machine.ask("ann", length=250) for _ in range(500)]
    for _ in range(450):
        cancel(machine, [one for one in asked if one in machine.running])
    machine.flood("ann", None, 10)
    cancel(machine, [one for one in asked if one in machine.running or one.turn in machine.waiting])
    for _ in range(10):
        assert machine.answer(machine.ask("bob"), within=200) <= 20 + 20 + 20 + 1


def test_cancelling_wins_nothing(machine: Machine) -> None:
    """A tenant that asks for much, leaves and asks again does not get ahead of one that lets its requests end."""
    machine.flood("bob", None, 100)
    machine.run(100)
    for _ in range(100):
        asked = [machine.ask("ann", length=250) for _ in range(30)]
        machine.run(10)
        cancel(machine, asked)
    assert machine.served["bob"] > 0.4 * machine.served.total()


# ---- Slots -----------------------------------------------------------------------------------------------------------


def test_a_version_keeps_its_slot_while_nobody_waits(machine: Machine) -> None:
    """However long: it goes on being let in at once."""
    machine.flood("ann", "ann@1", 4)
    machine.flood("bob", "bob@1", 4)
    machine.run(50 * SLICE_STEPS)
    assert machine.admission.waiting() == dict.fromkeys(Wait, 0)
    assert machine.admission.slots_used() == 2


@pytest.mark.parametrize("flood", [4, 100])
def test_a_third_version_gets_a_slot_of_two_busy_ones(machine: Machine, flood: int) -> None:
    """Within a slice and the time the requests inside take; vLLM alone would never let it in."""
    machine.flood("ann", "ann@1", flood)
    machine.flood("bob", "bob@1", flood)
    machine.run(3)
    assert machine.answer(machine.ask("cid", "cid@1"), within=1000) <= SLICE_STEPS + 20 + 20 + 1


def test_a_slot_is_kept_for_a_slice(machine: Machine) -> None:
    """One who waits does not have others drain before: loading an adapter has its price."""
    machine.flood("ann", "ann@1", 50, length=2)
    machine.flood("bob", "bob@1", 50, length=2)
    asked = machine.ask("cid", "cid@1", length=2)
    machine.run(SLICE_STEPS - 1)
    assert machine.admission.waiting()[Wait.SLOT] == 1
    assert machine.admission.waiting()[Wait.DRAIN] == 0
    machine.answer(asked, within=SLICE_STEPS + 5)


def test_a_long_request_does_not_keep_all_others_waiting(machine: Machine) -> None:
    """While the version whose turn it is to drain takes long, the next one drains too."""
    machine.ask("ann", "ann@1", length=5000)
    machine.run(1)
    machine.flood("bob", "bob@1", 50)
    asked = machine.ask("cid", "cid@1")
    assert machine.answer(asked, within=1000) <= 2 * (SLICE_STEPS + 20) + 20 + 20


def test_slots_go_round_over_tenants(machine: Machine) -> None:
    """A tenant with twenty busy versions does not have twenty times the turns of one that has one."""
    for number in range(20):
        machine.flood("ann", f"ann@{number}", 2)
    machine.flood("bob", "bob@1", 2)
    machine.run(500)
    alone = 20 + SLICE_STEPS + 20
    for _ in range(20):
        assert machine.answer(machine.ask("cid", "cid@1"), within=1000) <= 3 * alone


def test_every_version_of_a_tenant_gets_its_turn(machine: Machine) -> None:
    """One after another, the one that has waited longest first."""
    for number in range(10):
        machine.flood("ann", f"ann@{number}", 2)
    last = machine.ask("ann", "ann@last")
    assert machine.answer(last, within=10_000) <= 6 * (SLICE_STEPS + 20) + 20


def test_the_base_model_and_adapters_do_not_starve_each_other(machine: Machine) -> None:
    """In both directions, with all room taken."""
    machine.flood("ann", None, 100)
    machine.flood("bob", "bob@1", 100)
    machine.flood("bob", "bob@2", 100)
    machine.flood("bob", "bob@3", 100)
    machine.run(500)
    for _ in range(20):
        assert machine.answer(machine.ask("cid", None), within=1000) <= 40
        assert machine.answer(machine.ask("cid", "cid@1"), within=1000) <= 20 + SLICE_STEPS + 40


def test_a_waiter_that_leaves_has_nobody_drain(machine: Machine) -> None:
    """The versions inside take requests again."""
    machine.flood("ann", "ann@1", 4, length=100)
    machine.flood("bob", "bob@1", 4, length=100)
    machine.run(SLICE_STEPS)
    gone = machine.ask("cid", "cid@1")
    behind = machine.ask("ann", "ann@1")
    waiting = dict.fromkeys(Wait, 0) | {Wait.SLOT: 1, Wait.DRAIN: 1}
    assert machine.admission.waiting() == waiting
    machine.admission.leave(gone.turn)
    machine.run(1)
    machine.admission.advance(machine.now * STEP_S)
    assert behind.turn.inside


# ---- The queue's bounds ----------------------------------------------------------------------------------------------


def test_a_full_queue_refuses(machine: Machine) -> None:
    """A tenant beyond its own bound, told how long its first request has waited; others still get in."""
    for _ in range(514):
        machine.ask("bob")
    machine.now = 300
    with pytest.raises(QueueFullError, match="500 requests waiting") as refusal:
        machine.ask("bob")
    assert refusal.value.retry_after_s == 3.0
    assert machine.ask("ann").turn.inside


def test_those_whose_adapter_is_fetched_count(machine: Machine) -> None:
    """In the queue's bounds, for as long as they wait for it and after; one that leaves makes room."""
    turns = [turn("bob", "bob@1") for _ in range(500)]
    machine.admission.arrive(turns, 0.0, ready=False)
    assert machine.admission.advance(0.0) == []
    with pytest.raises(QueueFullError, match="500 requests waiting") as refusal:
        machine.admission.arrive([turn("bob")], 2.0)
    assert refusal.value.retry_after_s == 2.0
    assert machine.ask("ann").turn.inside
    machine.admission.leave(turns.pop())
    machine.admission.arrive([turn("bob")], 2.0)
    machine.admission.fetched(turns)
    assert machine.admission.waiting()[Wait.ADAPTER] == 0
    assert machine.admission.waiting()[Wait.SLOT] == 499


def test_floods_leave_others_room_to_wait() -> None:
    """However many tenants flood, there is room in the queue for one more tenant's request."""
    machine = Machine(Admission(bounds(waiting=100, waiting_per_tenant=100)))
    refused = 0
    for tenant in ("ann", "bob", "cid") * 200:
        try:
            machine.ask(tenant)
        except QueueFullError:
            refused += 1
    assert refused > 400
    machine.ask("dan")


def test_a_request_waits_whole_or_not_at_all(machine: Machine) -> None:
    """When some of its prompts would not fit into the queue, none is queued."""
    admission = machine.admission
    with pytest.raises(QueueFullError):
        admission.arrive([turn("ann") for _ in range(501)], 0.0)
    with pytest.raises(QueueFullError, match="bytes"):
        admission.arrive([turn("ann", size_bytes=1_000_001)], 0.0)
    assert admission.is_idle()
