"""The order of operations, whatever order they arrive in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from river_trainer.ordering import Entry, Ordering


def take_all(ordering: Ordering) -> list[Entry]:
    taken: list[Entry] = []
    while (entry := ordering.take()) is not None:
        taken.append(entry)
    return taken


@given(
    arrivals=st.integers(1, 12).flatmap(
        lambda count: st.permutations(
            [(run, seq) for run in ("run_a", "run_b") for seq in range(count)] * 2
        )
    )
)
def test_every_operation_comes_once_and_in_order(arrivals: list[tuple[str, int]]) -> None:
    """Shuffled and doubled arrivals come out by seq, once each; every second copy is a duplicate."""
    ordering = Ordering()
    taken: list[Entry] = []
    for stream_seq, (run_id, seq) in enumerate(arrivals, start=1):
        ordering.add(run_id, seq, stream_seq)
        if stream_seq % 3 == 0 and (entry := ordering.take()) is not None:
            taken.append(entry)
    taken += take_all(ordering)
    done = [entry for entry in taken if not entry.duplicate]
    for run_id in ("run_a", "run_b"):
        expected = sorted({seq for run, seq in arrivals if run == run_id})
        assert [entry.seq for entry in done if entry.run_id == run_id] == expected
    assert len(taken) == len(arrivals)
    assert len({entry.stream_seq for entry in taken}) == len(arrivals)
    assert len(ordering) == 0


def test_a_gap_holds_back_what_follows() -> None:
    """Nothing overtakes a missing operation of its run; other runs go on."""
    ordering = Ordering()
    ordering.open("run_a", done_seq=4)
    ordering.add("run_a", 6, 10)
    ordering.add("run_b", 0, 11)
    assert take_all(ordering) == [Entry("run_b", 0, 11)]
    assert ordering.oldest_waiting("run_a") == 10
    ordering.add("run_a", 5, 12)
    assert take_all(ordering) == [Entry("run_a", 5, 12), Entry("run_a", 6, 10)]
    assert ordering.oldest_waiting("run_a") is None


def test_runs_take_turns() -> None:
    """A run with a long queue does not keep another from its first operation."""
    ordering = Ordering()
    for seq in range(3):
        ordering.add("run_a", seq, seq + 1)
    ordering.add("run_b", 0, 4)
    assert [entry.run_id for entry in take_all(ordering)] == ["run_a", "run_b", "run_a", "run_a"]
