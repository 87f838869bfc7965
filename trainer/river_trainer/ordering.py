"""Which operation may be done next: strictly by seq within a run, in turn between runs.

Only the place of an operation in the stream is remembered, so that a long queue costs little memory. Operations that
come twice are handed out once as `duplicate`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Entry:
    """Operation `seq` of `run_id` is message `stream_seq`; `duplicate` if it has been done before."""

    run_id: str
    seq: int
    stream_seq: int
    duplicate: bool = False


@dataclass(slots=True)
class _Line:
    """One run's queue: `next_seq` is the operation that may be done, `waiting` maps seq to stream sequence."""

    next_seq: int
    waiting: dict[int, int] = field(default_factory=dict)


class Ordering:
    """The operations that are known and not done."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._turn: OrderedDict[str, None] = OrderedDict()  # runs whose next operation is there
        self._duplicates: deque[Entry] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size + len(self._duplicates)

    def open(self, run_id: str, *, done_seq: int) -> None:
        """A run whose operations up to `done_seq` are done; others start at operation 0."""
        assert run_id not in self._lines
        self._lines[run_id] = _Line(next_seq=done_seq + 1)

    def add(self, run_id: str, seq: int, stream_seq: int) -> None:
        """An operation has arrived, whatever came before it."""
        assert seq >= 0
        line = self._lines.setdefault(run_id, _Line(next_seq=0))
        if seq < line.next_seq or seq in line.waiting:
            self._duplicates.append(Entry(run_id, seq, stream_seq, duplicate=True))
            return
        line.waiting[seq] = stream_seq
        self._size += 1
        if seq == line.next_seq:
            self._turn[run_id] = None

    def take(self) -> Entry | None:
        """The next entry, None if nothing may be done. What is taken counts as done from then on."""
        if self._turn:
            run_id, _ = self._turn.popitem(last=False)
            line = self._lines[run_id]
            entry = Entry(run_id, line.next_seq, line.waiting.pop(line.next_seq))
            self._size -= 1
            line.next_seq += 1
            if line.next_seq in line.waiting:
                self._turn[run_id] = None
            return entry
        if self._duplicates:
            # Last, so that the first of two has been done when its copy is answered.
            return self._duplicates.popleft()
        return None

    def oldest_waiting(self, run_id: str) -> int | None:
        """The stream sequence of the run's oldest message that is not done, None if there is none."""
        line = self._lines.get(run_id)
        return min(line.waiting.values(), default=None) if line else None
