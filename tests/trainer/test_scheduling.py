"""Which operation comes next, whatever order they arrive in and whoever floods the queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from river_trainer.scheduling import Entry, Scheduler


def entry(
    run_id: str,
    seq: int,
    stream_seq: int = 0,
    *,
    tenant: str = "ten_a",
    tokens: int = 10,
    advances: bool = False,
) -> Entry:
    return Entry(run_id, seq, stream_seq, tenant, tokens, advances)


def take_all(scheduler: Scheduler, tokens_max: int = 1000) -> list[Entry]:
    taken: list[Entry] = []
    while batch := scheduler.take(tokens_max, 0.0):
        taken += batch
    return taken


@given(
    arrivals=st.integers(1, 12).flatmap(
        lambda count: st.permutations(
            [(run, seq) for run in ("run_a", "run_b") for seq in range(count)] * 2
        )
    ),
    advancing=st.sets(st.integers(0, 11)),
    tokens_max=st.integers(1, 60),
)
def test_every_operation_comes_once_and_in_order(
    arrivals: list[tuple[str, int]], advancing: set[int], tokens_max: int
) -> None:
    """Shuffled and doubled arrivals come out by seq, once each; every second copy is a duplicate."""
    scheduler = Scheduler(quantum_tokens=15)
    taken: list[Entry] = []
    for stream_seq, (run_id, seq) in enumerate(arrivals, start=1):
        scheduler.add(entry(run_id, seq, stream_seq, advances=seq in advancing), 0.0)
        if stream_seq % 3 == 0:
            taken += scheduler.take(tokens_max, 0.0)
    taken += take_all(scheduler, tokens_max)
    done = [one for one in taken if not one.duplicate]
    for run_id in ("run_a", "run_b"):
        expected = sorted({seq for run, seq in arrivals if run == run_id})
        assert [one.seq for one in done if one.run_id == run_id] == expected
    assert len(taken) == len(arrivals)
    assert len({one.stream_seq for one in taken}) == len(arrivals)
    assert (len(scheduler), scheduler.tokens) == (0, 0)
    assert scheduler.gaps() == []


def test_a_gap_holds_back_what_follows() -> None:
    """Nothing overtakes a missing operation of its run; other runs go on."""
    scheduler = Scheduler()
    scheduler.open("run_a", done_seq=4)
    scheduler.add(entry("run_a", 6, 10), 1.0)
    scheduler.add(entry("run_b", 0, 11), 2.0)
    assert [one.run_id for one in take_all(scheduler)] == ["run_b"]
    (gap,) = scheduler.gaps()
    assert (gap.run_id, gap.seq, gap.since) == ("run_a", 5, 1.0)
    assert [one.seq for one in gap.waiting] == [6]
    assert scheduler.oldest_waiting("run_a") == 10
    assert scheduler.missing_before("run_a", 6) == 5
    scheduler.add(entry("run_a", 5, 12), 3.0)
    assert scheduler.gaps() == []
    assert [one.stream_seq for one in take_all(scheduler)] == [12, 10]
    assert scheduler.oldest_waiting("run_a") is None


def test_a_closed_gap_makes_what_comes_late_a_duplicate() -> None:
    """After a gap was given up the run goes on behind it, and the missing operation is one that was done."""
    scheduler = Scheduler()
    scheduler.open("run_a", done_seq=0)
    for seq in (2, 4):
        scheduler.add(entry("run_a", seq, seq), 0.0)
    scheduler.continue_at("run_a", 5, 1.0)
    assert (len(scheduler), scheduler.gaps()) == (0, [])
    for seq in (1, 5):
        scheduler.add(entry("run_a", seq, 10 + seq), 2.0)
    assert [(one.seq, one.duplicate) for one in take_all(scheduler)] == [(1, True), (5, False)]


def test_a_batch_ends_a_run_where_it_advances() -> None:
    """What needs a step's result waits for the next batch; gradients before the step share one."""
    scheduler = Scheduler()
    for seq, advances in enumerate((True, False, False, True, False)):
        scheduler.add(entry("run_a", seq, seq, advances=advances), 0.0)
    batches = [[one.seq for one in scheduler.take(1000, 0.0)] for _ in range(3)]
    assert batches == [[0], [1, 2, 3], [4]]


def test_runs_of_a_tenant_take_turns() -> None:
    """A run with a long queue does not keep another of its tenant from its first operation."""
    scheduler = Scheduler()
    for seq in range(3):
        scheduler.add(entry("run_a", seq, seq + 1), 0.0)
    scheduler.add(entry("run_b", 0, 4), 0.0)
    assert [one.run_id for one in take_all(scheduler)] == ["run_a", "run_b", "run_a", "run_a"]


def test_a_flooding_tenant_delays_nobody_else() -> None:
    """Whoever floods with many runs and big operations gets half of the tokens, not more, while another has work."""
    scheduler = Scheduler(quantum_tokens=100)
    for run in range(50):
        for seq in range(20):
            scheduler.add(entry(f"run_f{run}", seq, tenant="ten_flood", tokens=170), 0.0)
    for seq in range(40):
        scheduler.add(entry("run_small", seq, tenant="ten_small", tokens=20), 0.0)
    spent = {"ten_flood": 0, "ten_small": 0}
    while spent["ten_small"] < 40 * 20:
        batch = scheduler.take(400, 0.0)
        assert batch
        for one in batch:
            spent[one.tenant_id] += one.tokens
        # Deficit round robin is off by at most one operation and one quantum a tenant.
        assert abs(spent["ten_flood"] - spent["ten_small"]) <= 170 + 2 * 100
    assert len(scheduler) > 900


def test_credit_is_not_saved_up_without_need() -> None:
    """A tenant that took one small operation a turn for long cannot flood everybody afterwards."""
    scheduler = Scheduler(quantum_tokens=100)
    for seq in range(200):
        scheduler.add(entry("run_slow", seq, tenant="ten_slow", advances=True), 0.0)
    for _ in range(190):
        assert len(scheduler.take(400, 0.0)) == 1
    for run in range(50):
        scheduler.add(entry(f"run_f{run}", 0, tenant="ten_slow", tokens=100), 0.0)
        scheduler.add(entry(f"run_o{run}", 0, tenant="ten_other", tokens=100), 0.0)
    batch = scheduler.take(1000, 0.0)
    assert sum(one.tokens for one in batch if one.tenant_id == "ten_other") >= 400


def test_tenants_whose_runs_do_not_fit_take_turns() -> None:
    """Where memory holds two of five tenants' runs, all of them get on alike."""
    scheduler = Scheduler()
    for number in range(5):
        for seq in range(20):
            scheduler.add(entry(f"run_{number}", seq, tenant=f"ten_{number}", advances=True), 0.0)
    done = dict.fromkeys((f"run_{number}" for number in range(5)), 0)
    for _ in range(20):
        room = 2

        def admit(_: str) -> bool:
            nonlocal room
            room -= 1
            return room >= 0

        for one in scheduler.take(1000, 0.0, admit=admit):
            done[one.run_id] += 1
    assert max(done.values()) - min(done.values()) <= 1


def test_what_is_not_ready_waits_and_others_go_on() -> None:
    """An operation whose data is still being read holds back its own run alone."""
    scheduler = Scheduler()
    for run_id in ("run_a", "run_b"):
        for seq in range(2):
            scheduler.add(entry(run_id, seq), 0.0)
    batch = scheduler.take(1000, 0.0, ready=lambda one: (one.run_id, one.seq) != ("run_a", 1))
    assert sorted((one.run_id, one.seq) for one in batch) == [
        ("run_a", 0),
        ("run_b", 0),
        ("run_b", 1),
    ]
    assert [(one.run_id, one.seq) for one in take_all(scheduler)] == [("run_a", 1)]


def test_an_operation_bigger_than_everything_gets_its_turn() -> None:
    """One operation may be larger than quantum and batch; it is taken alone in the end."""
    scheduler = Scheduler(quantum_tokens=10)
    scheduler.add(entry("run_big", 0, tenant="ten_big", tokens=5000), 0.0)
    for seq in range(5):
        scheduler.add(entry("run_a", seq, tenant="ten_a"), 0.0)
    taken = take_all(scheduler, tokens_max=50)
    assert [one.run_id for one in taken].count("run_big") == 1
    assert len(taken) == 6


def test_only_runs_that_fit_are_taken_together() -> None:
    """Who is not admitted waits for the next batch; the first always is."""
    scheduler = Scheduler()
    for run in range(5):
        scheduler.add(entry(f"run_{run}", 0, run), 0.0)
    batches: list[int] = []
    while True:
        room = 2

        def admit(_: str) -> bool:
            nonlocal room
            room -= 1
            return room >= 0

        batch = scheduler.take(1000, 0.0, admit=admit)
        if not batch:
            break
        batches.append(len(batch))
    assert batches == [2, 2, 1]
