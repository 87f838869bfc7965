"""Whose turn it is: which requests may be inside vLLM, decided from what is known, without waiting for anything.

vLLM by itself serves whoever came first, and passes over requests whose adapter does not fit into its batches for as
long as others keep coming. So everything waits here instead, and goes in by these rules:

* A request whose adapter is still being fetched is in the queue, and counts there, but waits for nothing else yet.
* Then it waits in the lane of its version (the base model has one too), behind its tenant's earlier ones.
* Of the tenants whose first request could go in now, the one goes first that has been served least, in tokens: those
  that have been used, and those that its requests inside may use. A tenant that was away has no claim on what it did
  not use, and one whose requests were cancelled none before somebody who comes later.
* Room inside is shared (`SharedBound`): one tenant alone leaves an eighth of it, so that another's first requests need
  not wait for its long ones to end. A request that is due and within its tenant's share is passed by nobody.
* At most `slots` versions are inside. While others wait for a slot, a version that has had one for `slice_s` takes no
  new requests, so that it drains; its slot goes round robin over tenants to the version that has waited longest. While
  nobody waits, a version keeps its slot.

`Admission` is told of everything that happens and of the time; `turns.py` does the waiting.
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from river_engine.limits import (
    COMPLETION_GUESS_TOKENS,
    COMPLETION_GUESS_WEIGHT,
    TENANTS_REMEMBERED_MAX,
)
from river_engine.shares import Fit, SharedBound


class QueueFullError(Exception):
    """There is no room to wait; `retry_after_s` is how long this tenant's first request has been waiting."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Wait(enum.StrEnum):
    """What a request waits for."""

    ADAPTER = "adapter"
    ROOM = "room"
    SLOT = "slot"
    DRAIN = "drain"
    """Its version has to let go of its slot first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What may be inside vLLM at once, and what may wait for it.

    Inside: `sequences`, `tokens`, and `slots` for versions, each kept for `slice_s` seconds while others wait for one.
    Prompts may be `waiting`, of one tenant `waiting_per_tenant`, with bodies of `waiting_bytes` in all.
    """

    sequences: int
    tokens: int
    slots: int
    slice_s: float
    waiting: int
    waiting_per_tenant: int
    waiting_bytes: int


@dataclass(slots=True, eq=False, kw_only=True)
class Turn:
    """One prompt on its way through, with `sequences` answers of at most `completion_tokens_max` each.

    `version` is None for the base model. `tokens` is what it is thought to cost, set on arrival; `produced` counts the
    tokens that have come out.
    """

    tenant: str
    version: str | None
    prompt_tokens: int
    completion_tokens_max: int
    sequences: int = 1
    size_bytes: int = 0
    tokens: int = 0
    produced: int = 0
    number: int = -1
    arrived_at: float = 0.0
    inside: bool = False

    @property
    def outstanding_tokens(self) -> int:
        """What is thought to be left of it."""
        return max(0, self.tokens - self.produced)


@dataclass(slots=True, eq=False)
class _Tenant:
    """`served` is in tokens, of requests that have ended; `granted` is when it last got a slot, in ticks."""

    served: float = 0.0
    granted: int = 0
    turns: int = 0
    waiting: int = 0
    completion_guess: float = COMPLETION_GUESS_TOKENS


@dataclass(slots=True, eq=False)
class _Lane:
    """All requests for one version. `queues` are by tenant, none empty.

    `opened_at` is since when it has its slot, used or not; `waits_since` is in ticks.
    """

    queues: dict[str, deque[Turn]] = field(default_factory=dict[str, deque[Turn]])
    inside: int = 0
    has_slot: bool = False
    waits_since: int = 0
    opened_at: float | None = None
    closing_since: float | None = None

    def waiting(self) -> int:
        return sum(len(queue) for queue in self.queues.values())

    def take_slot(self, now: float) -> None:
        self.has_slot = True
        self.opened_at = now
        self.closing_since = None

    def leave_slot(self, tick: int) -> None:
        assert self.inside == 0
        self.has_slot = False
        self.opened_at = self.closing_since = None
        self.waits_since = tick

    def wait(self) -> Wait:
        """What those in it wait for."""
        if not self.has_slot:
            return Wait.SLOT
        return Wait.ROOM if self.closing_since is None else Wait.DRAIN


class Admission:
    """The requests of one engine, waiting or inside; times are in seconds of any one clock."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._sequences = SharedBound(bounds.sequences)
        self._tokens = SharedBound(bounds.tokens)
        self._waiting = SharedBound(bounds.waiting)
        self._waiting_bytes = SharedBound(bounds.waiting_bytes)
        self._base = _Lane(has_slot=True)
        self._versions: dict[str, _Lane] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._away: OrderedDict[str, _Tenant] = OrderedDict()
        # In the order they came.
        self._without_adapter: dict[Turn, None] = {}
        self._inside: set[Turn] = set()
        self._numbers = itertools.count()
        # Orders whatever happens to slots.
        self._ticks = itertools.count(1)
        # What a tenant would have been served that has always been waiting: where newcomers begin. Only what has been
        # used counts, for what was guessed of requests that are then cancelled was served to nobody.
        self._served_fairly = 0.0

    # ---- What happens ------------------------------------------------------------------------------------------------

    def arrive(self, turns: list[Turn], now: float, *, ready: bool = True) -> None:
        """Queues the turns of one request of one tenant, all or none; `ready` if its adapter, if any, is here.

        Raises:
            QueueFullError: too much is waiting.
        """
        self.check(turns, now)
        name = turns[0].tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = self._away.pop(name, None) or _Tenant()
            tenant.served = max(tenant.served, self._served_fairly)
        for turn in turns:
            assert turn.tenant == name
            assert turn.number < 0, "a turn arrives once"
            turn.number = next(self._numbers)
            turn.arrived_at = now
            answers = turn.sequences * min(turn.completion_tokens_max, tenant.completion_guess)
            turn.tokens = self._tokens.clamp(turn.prompt_tokens + int(answers) + 1)
            tenant.turns += 1
            tenant.waiting += 1
            self._waiting.take(turn.tenant, 1)
            self._waiting_bytes.take(turn.tenant, turn.size_bytes)
            if ready:
                self._enqueue(turn)
            else:
                self._without_adapter[turn] = None

    def fetched(self, turns: list[Turn]) -> None:
        """Has turns that arrived before their adapter wait for all the rest."""
        for turn in turns:
            del self._without_adapter[turn]
            self._enqueue(turn)

    def check(self, turns: list[Turn], now: float) -> None:
        """Whether `arrive` would queue these turns.

        Raises:
            QueueFullError: it would not.
        """
        name, tenants = turns[0].tenant, len(self._tenants)
        tenant = self._tenants.get(name)
        if (tenant.waiting if tenant else 0) + len(turns) > self._bounds.waiting_per_tenant:
            reason = f"a tenant may have {self._bounds.waiting_per_tenant} requests waiting here"
        elif self._waiting.fit(name, len(turns), tenants) is not Fit.FITS:
            reason = f"{self._waiting.used} requests are waiting here"
        elif (
            self._waiting_bytes.fit(name, sum(turn.size_bytes for turn in turns), tenants)
            is not Fit.FITS
        ):
            reason = f"requests of {self._waiting_bytes.used} bytes are waiting here"
        else:
            return
        arrivals = [turn.arrived_at for turn in self._queued() if turn.tenant == name]
        raise QueueFullError(reason, now - min(arrivals, default=now))

    def leave(self, turn: Turn) -> None:
        """Ends a turn, whether it waits or is inside."""
        tenant = self._tenants[turn.tenant]
        if turn.inside:
            self._inside.remove(turn)
            turn.inside = False
            self._lane(turn.version).inside -= 1
            self._sequences.give_back(turn.tenant, self._sequences.clamp(turn.sequences))
            self._tokens.give_back(turn.tenant, turn.tokens)
            tokens = turn.prompt_tokens + turn.produced
            tenant.served += tokens
            # It moves with every service, so that no row of newcomers can keep a tenant with a past waiting for ever.
            self._served_fairly += tokens / len(self._tenants)
            if turn.produced:
                error = turn.produced / turn.sequences - tenant.completion_guess
                tenant.completion_guess += COMPLETION_GUESS_WEIGHT * error
        else:
            self._dequeue(turn, tenant)
        lane = self._lane(turn.version)
        if turn.version is not None and not lane.queues and not lane.inside:
            del self._versions[turn.version]
        tenant.turns -= 1
        if not tenant.turns:
            self._away[turn.tenant] = self._tenants.pop(turn.tenant)
            if len(self._away) > TENANTS_REMEMBERED_MAX:
                self._away.popitem(last=False)

    def advance(self, now: float) -> list[Turn]:
        """Lets in whoever can be: to be called after each arrival and leave."""
        if not self._waiting.used:
            self._close(0, now)
            return []
        self._pass_slots_on(now)
        admitted: list[Turn] = []
        over: set[str] = set()
        while self._sequences.left and (turn := self._next(over)) is not None:
            fit = self._fit(turn)
            if fit is Fit.WAITS:
                break
            if fit is Fit.OVER:
                over.add(turn.tenant)
                continue
            self._let_in(turn)
            admitted.append(turn)
        return admitted

    # ---- What is so --------------------------------------------------------------------------------------------------

    def is_idle(self) -> bool:
        return not self._tenants

    def turns_inside(self) -> int:
        return len(self._inside)

    def slots_used(self) -> int:
        return sum(lane.has_slot for lane in self._versions.values())

    def waiting(self) -> dict[Wait, int]:
        counts = dict.fromkeys(Wait, 0) | {Wait.ADAPTER: len(self._without_adapter)}
        for lane in (self._base, *self._versions.values()):
            counts[lane.wait()] += lane.waiting()
        return counts

    def outstanding_tokens(self) -> int:
        """Of all that are waiting or inside, as far as can be guessed."""
        return sum(
            turn.outstanding_tokens for turn in itertools.chain(self._inside, self._queued())
        )

    # ---- Waiting -----------------------------------------------------------------------------------------------------

    def _enqueue(self, turn: Turn) -> None:
        lane = self._lane(turn.version)
        lane.queues.setdefault(turn.tenant, deque()).append(turn)

    def _dequeue(self, turn: Turn, tenant: _Tenant) -> None:
        if turn in self._without_adapter:
            del self._without_adapter[turn]
        else:
            lane = self._lane(turn.version)
            queue = lane.queues[turn.tenant]
            queue.remove(turn)
            if not queue:
                del lane.queues[turn.tenant]
        tenant.waiting -= 1
        self._waiting.give_back(turn.tenant, 1)
        self._waiting_bytes.give_back(turn.tenant, turn.size_bytes)

    def _lane(self, version: str | None) -> _Lane:
        if version is None:
            return self._base
        lane = self._versions.get(version)
        if lane is None:
            lane = self._versions[version] = _Lane(waits_since=next(self._ticks))
        return lane

    def _queued(self) -> Iterator[Turn]:
        yield from self._without_adapter
        for lane in (self._base, *self._versions.values()):
            for queue in lane.queues.values():
                yield from queue

    # ---- Room --------------------------------------------------------------------------------------------------------

    def _next(self, over: Iterable[str]) -> Turn | None:
        """Of those whose version takes requests, the first of the tenant that was served least."""
        best: Turn | None = None
        best_key = (0.0, 0)
        for lane in (self._base, *self._versions.values()):
            if not lane.queues or lane.wait() is not Wait.ROOM:
                continue
            for name, queue in lane.queues.items():
                served = self._tenants[name].served + self._tokens.own(name)
                key = (served, queue[0].number)
                if (best is None or key < best_key) and name not in over:
                    best, best_key = queue[0], key
        return best

    def _fit(self, turn: Turn) -> Fit:
        tenants = len(self._tenants)
        sequences = self._sequences.clamp(turn.sequences)
        fits = (
            self._sequences.fit(turn.tenant, sequences, tenants),
            self._tokens.fit(turn.tenant, turn.tokens, tenants),
        )
        return next((fit for fit in (Fit.OVER, Fit.WAITS) if fit in fits), Fit.FITS)

    def _let_in(self, turn: Turn) -> None:
        tenant, lane = self._tenants[turn.tenant], self._lane(turn.version)
        assert lane.has_slot
        assert lane.queues[turn.tenant][0] is turn
        self._dequeue(turn, tenant)
        lane.inside += 1
        self._inside.add(turn)
        turn.inside = True
        self._sequences.take(turn.tenant, self._sequences.clamp(turn.sequences))
        self._tokens.take(turn.tenant, turn.tokens)
        self._served_fairly = max(self._served_fairly, tenant.served)

    # ---- Slots -------------------------------------------------------------------------------------------------------

    def _pass_slots_on(self, now: float) -> None:
        """Takes slots from versions that are done with them, gives them to those that wait, and has others drain."""
        needed = sum(not lane.has_slot for lane in self._versions.values())
        needed -= self._bounds.slots - self.slots_used()
        self._close(max(0, needed), now)
        for lane in self._versions.values():
            if lane.closing_since is not None and not lane.inside:
                lane.leave_slot(next(self._ticks))
        for _ in range(self._bounds.slots - self.slots_used()):
            self._grant(now)

    def _close(self, needed: int, now: float) -> None:
        """Has as many versions drain as others wait for a slot, those first that have had theirs longest.

        One that has been draining for a slice is not counted: its requests are long, and others may be done sooner.
        """
        opened = [
            (lane.opened_at, lane)
            for lane in self._versions.values()
            if lane.has_slot and lane.opened_at is not None
        ]
        for opened_at, lane in sorted(opened, key=lambda pair: pair[0]):
            if not needed or now - opened_at < self._bounds.slice_s:
                lane.closing_since = None
                continue
            if lane.closing_since is None:
                lane.closing_since = now
            if now - lane.closing_since < self._bounds.slice_s:
                needed -= 1

    def _grant(self, now: float) -> None:
        """Gives a free slot to the version that has waited longest, of the tenant whose turn for one it is."""
        waiting = [lane for lane in self._versions.values() if not lane.has_slot]
        if not waiting:
            return

        def due(lane: _Lane) -> tuple[int, int]:
            granted = min(self._tenants[name].granted for name in lane.queues)
            return max(lane.waits_since, granted), lane.waits_since

        lane = min(waiting, key=due)
        lane.take_slot(now)
        tick = next(self._ticks)
        for name in lane.queues:
            tenant = self._tenants[name]
            tenant.granted = tick
            # While it could not be served it has gathered no claim to be served alone now.
            tenant.served = max(tenant.served, self._served_fairly)
