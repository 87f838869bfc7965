"""Which operations are done next: strictly by seq within a run, fairly by tokens between tenants.

Tenants take turns by deficit round robin (Shreedhar and Varghese, 1995): at each turn a tenant gets a quantum of tokens
to spend on the operations of its runs, which take turns too, and what it cannot spend it keeps for its next turn. A
tenant that floods the queue waits longer itself and nobody else does.

Only the place of an operation in the stream and its size are remembered, so that a long queue costs little memory.
Operations that come twice are handed out once as `duplicate`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from river_trainer import limits


@dataclass(frozen=True, slots=True)
class Entry:
    """Operation `seq` of `run_id` is message `stream_seq`; `duplicate` if it has been done before.

    `tokens` is what it costs its tenant; `advances` says that what comes after it in its run needs its result.
    """

    run_id: str
    seq: int
    stream_seq: int
    tenant_id: str = ""
    tokens: int = 0
    advances: bool = False
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Operation `seq` of a run is missing since `since`, while `waiting` ones after it are there."""

    run_id: str
    seq: int
    since: float
    waiting: tuple[Entry, ...]


@dataclass(slots=True)
class _Line:
    """One run's queue: `next_seq` is the operation that may be done, missing since `gap_since`."""

    tenant_id: str
    next_seq: int
    waiting: dict[int, Entry] = field(default_factory=dict)
    gap_since: float | None = None

    @property
    def ready(self) -> bool:
        return self.next_seq in self.waiting


@dataclass(slots=True)
class _Tenant:
    """`ready` holds the runs that have something to do, in turn; `credit` is in tokens."""

    ready: OrderedDict[str, None] = field(default_factory=OrderedDict)
    credit: int = 0


@dataclass(slots=True)
class _Taking:
    """A batch in the making. `closed` runs have no more part in it; tenants of runs not admitted are `refused`."""

    tokens_max: int
    ready: Callable[[Entry], bool]
    admit: Callable[[str], bool]
    now: float
    batch: list[Entry] = field(default_factory=list[Entry])
    tokens: int = 0
    closed: set[str] = field(default_factory=set[str])
    admitted: set[str] = field(default_factory=set[str])
    refused: list[str] = field(default_factory=list[str])

    @property
    def open(self) -> bool:
        return self.tokens < self.tokens_max and len(self.batch) < limits.BATCH_OPERATIONS_MAX

    def admits(self, run_id: str, tenant_id: str) -> bool:
        if run_id in self.admitted:
            return True
        if self.admit(run_id) or not self.admitted:
            self.admitted.add(run_id)
            return True
        self.closed.add(run_id)
        if tenant_id not in self.refused:
            self.refused.append(tenant_id)
        return False

    def add(self, entry: Entry) -> None:
        self.batch.append(entry)
        self.tokens += entry.tokens
        if entry.advances:
            self.closed.add(entry.run_id)


class Scheduler:
    """The operations that are known and not done."""

    def __init__(self, *, quantum_tokens: int = limits.TENANT_QUANTUM_TOKENS) -> None:
        assert quantum_tokens > 0
        self._quantum = quantum_tokens
        self._lines: dict[str, _Line] = {}
        self._tenants: OrderedDict[str, _Tenant] = (
            OrderedDict()
        )  # those with something ready, in turn
        self._duplicates: deque[Entry] = deque()
        self._size = 0
        self._tokens = 0

    def __len__(self) -> int:
        return self._size + len(self._duplicates)

    @property
    def tokens(self) -> int:
        """Tokens of everything that waits."""
        return self._tokens

    def open(self, run_id: str, *, done_seq: int) -> None:
        """A run whose operations up to `done_seq` are done; others start at operation 0."""
        assert run_id not in self._lines
        self._lines[run_id] = _Line("", next_seq=done_seq + 1)

    def add(self, entry: Entry, now: float) -> None:
        """An operation has arrived at `now`, in monotonic seconds, whatever came before it."""
        assert entry.seq >= 0
        line = self._lines.setdefault(entry.run_id, _Line(entry.tenant_id, next_seq=0))
        line.tenant_id = line.tenant_id or entry.tenant_id
        if entry.seq < line.next_seq or entry.seq in line.waiting:
            self._duplicates.append(replace(entry, duplicate=True))
            return
        line.waiting[entry.seq] = entry
        self._size += 1
        self._tokens += entry.tokens
        self._look(entry.run_id, line, now)

    def take(
        self,
        tokens_max: int,
        now: float,
        *,
        ready: Callable[[Entry], bool] = lambda _: True,
        admit: Callable[[str], bool] = lambda _: True,
    ) -> list[Entry]:
        """The next batch: about `tokens_max` tokens, empty if nothing may be done. What is taken counts as done.

        A run's operations come in order, up to one that advances it or that is not `ready`. `admit` is asked once for
        every run and may refuse it for this batch, unless it is the first; its tenant comes first in the next one.
        """
        taking = _Taking(tokens_max, ready, admit, now)
        taking.batch += self._copies()
        while taking.open:
            tenant_id = self._next_tenant(taking.closed)
            if tenant_id is None:
                break
            self._turn(tenant_id, taking)
        for tenant_id in reversed(taking.refused):
            if tenant_id in self._tenants:
                self._tenants.move_to_end(tenant_id, last=False)
        return taking.batch

    def _copies(self) -> list[Entry]:
        """Second copies of operations whose first has been taken; the others wait for theirs."""
        done = [copy for copy in self._duplicates if copy.seq < self._lines[copy.run_id].next_seq]
        if done:
            self._duplicates = deque(copy for copy in self._duplicates if copy not in set(done))
        return done

    def _next_tenant(self, closed: set[str]) -> str | None:
        """The tenant whose turn it is, moved to the end of the line."""
        for tenant_id, tenant in self._tenants.items():
            if any(run_id not in closed for run_id in tenant.ready):
                self._tenants.move_to_end(tenant_id)
                return tenant_id
        return None

    def _turn(self, tenant_id: str, taking: _Taking) -> None:
        """One tenant spends its credit."""
        tenant = self._tenants[tenant_id]
        tenant.credit += self._quantum
        while taking.open:
            run_id = next((run for run in tenant.ready if run not in taking.closed), None)
            if run_id is None:
                break
            line = self._lines[run_id]
            entry = line.waiting[line.next_seq]
            if not taking.ready(entry):
                taking.closed.add(run_id)
                continue
            if entry.tokens > tenant.credit:
                return  # It keeps its credit: it saves up for this operation.
            if not taking.admits(run_id, tenant_id):
                continue
            self._remove(line, entry)
            tenant.credit -= entry.tokens
            taking.add(entry)
            tenant.ready.move_to_end(run_id)
            self._look(run_id, line, taking.now)
        # Nothing more to spend it on: credit saved up in idleness would be a flood later.
        tenant.credit = min(tenant.credit, self._quantum)

    def _remove(self, line: _Line, entry: Entry) -> None:
        del line.waiting[entry.seq]
        line.next_seq = entry.seq + 1
        self._size -= 1
        self._tokens -= entry.tokens

    def _look(self, run_id: str, line: _Line, now: float) -> None:
        """Puts a run into its tenant's line or takes it out, as it has something ready or not."""
        if line.ready:
            line.gap_since = None
            self._tenants.setdefault(line.tenant_id, _Tenant()).ready.setdefault(run_id, None)
            return
        tenant = self._tenants.get(line.tenant_id)
        if tenant is not None:
            tenant.ready.pop(run_id, None)
            if not tenant.ready:
                # Credit is for those who wait: an idle tenant saves nothing up.
                del self._tenants[line.tenant_id]
        if not line.waiting:
            line.gap_since = None
        elif line.gap_since is None:
            line.gap_since = now

    # ---- Gaps ------------------------------------------------------------------------------------

    def gaps(self) -> list[Gap]:
        """Runs that cannot go on because an operation is missing."""
        found = (self.gap_of(run_id) for run_id in self._lines)
        return [gap for gap in found if gap is not None]

    def gap_of(self, run_id: str) -> Gap | None:
        """What a run is waiting for, if it is."""
        line = self._lines[run_id]
        if line.gap_since is None:
            return None
        waiting = tuple(line.waiting[seq] for seq in sorted(line.waiting))
        return Gap(run_id, line.next_seq, line.gap_since, waiting)

    def restart_gaps(self, now: float) -> None:
        """Nothing could arrive until now: what is missing is missing from now on."""
        for line in self._lines.values():
            if line.gap_since is not None:
                line.gap_since = now

    def continue_at(self, run_id: str, seq: int, now: float) -> list[Entry]:
        """What was to come before `seq` in a run counts as done, whether it is there or not; returns what was."""
        line = self._lines[run_id]
        dropped = [line.waiting.pop(earlier) for earlier in sorted(line.waiting) if earlier < seq]
        self._size -= len(dropped)
        self._tokens -= sum(entry.tokens for entry in dropped)
        line.next_seq = seq
        line.gap_since = None
        self._look(run_id, line, now)
        return dropped

    # ---- Looking ---------------------------------------------------------------------------------

    def oldest_waiting(self, run_id: str) -> int | None:
        """The stream sequence of the run's oldest message that is not done, None if there is none."""
        line = self._lines.get(run_id)
        if line is None:
            return None
        return min((entry.stream_seq for entry in line.waiting.values()), default=None)

    def missing_before(self, run_id: str, seq: int) -> int | None:
        """The operation that `seq`, which waits, cannot do without and that is not there."""
        line = self._lines.get(run_id)
        if line is None or seq not in line.waiting or line.ready:
            return None
        return line.next_seq

    def ahead_of(self, run_id: str, seq: int) -> int | None:
        """How many operations of all runs wait, if `seq` is one of them; None if it is not."""
        line = self._lines.get(run_id)
        return self._size - 1 if line is not None and seq in line.waiting else None
