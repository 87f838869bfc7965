"""One gateway's share of a limit that all gateways keep together. Pure: time comes in, in seconds of a steady clock.

Every gateway keeps a copy of the pool of a limit: a bucket that fills at the limit's rate. Before it admits anything, a
gateway draws from the pool and announces that, so that the draw is in everybody's copy; then it spends what it holds
without asking anybody. What keeps the sum right:

* A gateway draws at most its portion of what it sees in the pool. The portions of all gateways add up to one, so that
  gateways which draw before they have heard of each other still draw no more than there is.
* It draws again only after a round, `QUOTA_ROUND_S`, when it has heard of all draws made before its own last one.
* Those that use a limit share three quarters of it, the others the rest, so that a newcomer can start. Who draws
  little draws seldom: what is left in the pool is there for the one that needs it.
* If a portion is too little for even the one request at hand, and the pool holds enough, that much is drawn.

So over any T seconds, gateways that hear each other within half a round admit together no more than

    limit * (1 + (T + QUOTA_HOLD_S + QUOTA_TICK_S) / 60), and one request more for each gateway but one,

the bucket's content at the start, what has flowed in, the age that a drawn unit may have when it is spent, and
simultaneous draws by the last rule. What is too much is owed: it is missing from the pool afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from river_gateway.limits import (
    QUOTA_HOLD_S,
    QUOTA_IDLE_S,
    QUOTA_ROUND_S,
    QUOTA_TICK_S,
    RETRY_AFTER_S,
)
from river_gateway.tenancy.messages import Part

if TYPE_CHECKING:
    from river_gateway.tenancy.messages import LimitKind
    from river_gateway.tenancy.replicas import Replicas

_SLACK = 1e-6
"""What sums of floats may lack."""
_ACTIVE_PORTION = 0.75
_MINUTE_S = 60.0
_NEVER = float("-inf")


class TokenBucket:
    """Holds up to `capacity` and fills at `per_s`. It may be overdrawn, and then fills from below zero.

    Whoever draws only what `level` shows admits at most `capacity + per_s * T` in any T seconds.
    """

    __slots__ = ("_at", "_level", "capacity", "per_s")

    def __init__(self, capacity: float, per_s: float, now: float) -> None:
        assert capacity > 0
        assert per_s > 0
        self.capacity = capacity
        self.per_s = per_s
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """What can be drawn; below zero what is owed."""
        if now > self._at:
            self._level = min(self.capacity, self._level + (now - self._at) * self.per_s)
            self._at = now
        return self._level

    def draw(self, now: float, amount: float) -> None:
        """Takes `amount` out, or puts it back when it is negative; what does not fit is lost."""
        self._level = min(self.capacity, self.level(now) - amount)

    def wait_s(self, now: float, amount: float) -> float:
        """Seconds until `amount` can be drawn, if nobody else draws."""
        return max(0.0, (amount - self.level(now)) / self.per_s)

    def resize(self, now: float, capacity: float, per_s: float, *, level: float) -> None:
        """Becomes another bucket, with `level` in it as far as that fits."""
        self.capacity, self.per_s = capacity, per_s
        self._level, self._at = min(level, capacity), now


class Share(ABC):
    """What the shares of rates and of slots have in common: who else uses the limit, and when to draw."""

    __slots__ = (
        "_announced_at",
        "_drew_at",
        "_replicas",
        "_wanted_at",
        "active_peers",
        "kind",
        "limit",
        "owner",
    )

    def __init__(self, owner: str, kind: LimitKind, limit: int, replicas: Replicas) -> None:
        assert limit > 0
        self.owner = owner
        self.kind: LimitKind = kind
        self.limit = limit
        self._replicas = replicas
        self._wanted_at = _NEVER
        self._drew_at = _NEVER
        self._announced_at: float | None = None
        self.active_peers: set[str] = set()

    def active(self, now: float) -> bool:
        """Whether requests have asked for it lately."""
        return now - self._wanted_at < QUOTA_IDLE_S

    @abstractmethod
    def offer(self, now: float, need: int) -> bool:
        """Whether `need` can be used; gets it where it is not here."""

    @abstractmethod
    def wait_s(self, now: float, need: int) -> float:
        """Seconds after which an `offer` that failed may succeed."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """Puts back what is not likely to be needed soon."""

    @abstractmethod
    def idle(self, now: float) -> bool:
        """Whether a new share would be just like this one."""

    @abstractmethod
    def news(self, now: float) -> Part:
        """What the others are told now. A share that is active counts itself in a round later."""

    @abstractmethod
    def hear(self, now: float, sender: str, part: Part) -> None:
        """What another gateway has told."""

    def forget(self, peer: str) -> None:
        """A gateway has gone."""
        self.active_peers.discard(peer)

    def _part(self, now: float, amount: float) -> Part:
        return Part(self.owner, self.kind, self.limit, amount, self.active(now))

    def _told(self, now: float) -> None:
        if not self.active(now):
            self._announced_at = None
        elif self._announced_at is None:
            self._announced_at = now

    def _heard(self, sender: str, part: Part) -> None:
        if part.active:
            self.active_peers.add(sender)
        else:
            self.active_peers.discard(sender)

    def _portion(self, now: float) -> float:
        count, others = self._replicas.count, len(self.active_peers)
        if self._announced_at is not None and now - self._announced_at >= QUOTA_ROUND_S:
            actives = others + 1
            return 1 / count if actives == count else _ACTIVE_PORTION / actives
        if others == 0:
            return 1 / count
        return (1 - _ACTIVE_PORTION) / max(1, count - others)

    def _may_draw(self, now: float) -> bool:
        return now - self._drew_at >= QUOTA_ROUND_S

    def _changed(self) -> None:
        self._replicas.changed(self)

    def _tick(self, now: float) -> None:
        if self._announced_at is not None and not self.active(now):
            self._announced_at = None
            self._changed()


class RateShare(Share):
    """The share of a limit per minute, in requests or tokens. The whole pool is one minute's allowance."""

    __slots__ = ("_pending", "_spent", "held", "pool")

    def __init__(
        self, owner: str, kind: LimitKind, limit: int, replicas: Replicas, now: float
    ) -> None:
        super().__init__(owner, kind, limit, replicas)
        self.pool = TokenBucket(limit, limit / _MINUTE_S, now)
        self.held = 0.0
        self._pending = 0.0
        self._spent = 0.0
        if replicas.cut_off:
            self.part(now)

    def offer(self, now: float, need: int) -> bool:
        """Whether `need` can be spent; draws it where it is not held."""
        self._wanted_at = now
        lacking = min(need, self.pool.capacity) - self.held - _SLACK
        if lacking <= 0:
            return True
        level = self.pool.level(now)
        if level < lacking:
            return False
        if self._replicas.shared:
            if not self._may_draw(now):
                return False
            self._draw(now, max(lacking + _SLACK, level * self._portion(now)))
            self._drew_at = now
        return True

    def spend(self, now: float, amount: float) -> None:
        """Spends `amount`, or gives it back when it is negative. What is not held is drawn, even if it is not there."""
        self.held -= amount
        self._spent += amount
        if self.held < 0 or not self._replicas.shared:
            self._draw(now, -self.held)

    def remaining(self, now: float) -> float:
        """What is left of the limit as far as is known here."""
        return max(0.0, self.pool.level(now) + self.held)

    def wait_s(self, now: float, need: int) -> float:
        """Seconds after which an `offer` that failed may succeed, if others leave it."""
        lacking = min(need, self.pool.capacity) - self.held
        wait_s = self.pool.wait_s(now, lacking)
        return max(wait_s, self._drew_at + QUOTA_ROUND_S - now) if self._replicas.shared else wait_s

    def full_in_s(self, now: float) -> float:
        """Seconds until all of the limit is there again, if nothing is asked of it."""
        return self.pool.wait_s(now, self.pool.capacity - self.held)

    def tick(self, now: float) -> None:
        """Puts back what is held beyond what is likely to be spent soon, and all of it when it has been held long."""
        keep = self._spent * (QUOTA_HOLD_S / QUOTA_TICK_S)
        self._spent = 0.0
        if now - self._drew_at >= QUOTA_HOLD_S or not self._replicas.shared:
            keep = 0.0
        if self.held > max(keep, 0.0):
            self._draw(now, max(keep, 0.0) - self.held)
        self._tick(now)

    def idle(self, now: float) -> bool:
        """Whether a new share would be just like this one."""
        return not self.active(now) and self.remaining(now) >= self.limit - _SLACK

    # ---- The others --------------------------------------------------------------------------------------------------

    def news(self, now: float) -> Part:
        """What was drawn since this was last called."""
        self._told(now)
        pending, self._pending = self._pending, 0.0
        return self._part(now, pending)

    def view(self, now: float) -> Part:
        """What is in the pool, for one that does not know."""
        return self._part(now, self.pool.level(now))

    def hear(self, now: float, sender: str, part: Part) -> None:
        """Another gateway has drawn."""
        self._heard(sender, part)
        self.pool.draw(now, part.amount)

    def hear_view(self, now: float, sender: str, part: Part) -> None:
        """What another gateway sees in the pool; the lower view is taken."""
        self._heard(sender, part)
        self.pool.draw(now, max(0.0, self.pool.level(now) - part.amount))

    def resize(self, now: float, limit: int) -> None:
        """The limit has been changed: as much of the new one is left, in proportion, as was of the old."""
        level = self.pool.level(now)
        scale = limit / self.limit if level > 0 else 1.0
        self.limit = limit
        self._fit(now, level * scale)

    def part(self, now: float) -> None:
        """Nobody hears: this gateway goes on with its part of the pool and of the rate alone."""
        self._fit(now, self.pool.level(now) / self._replicas.count)

    def rejoin(self, now: float) -> None:
        """All hear each other again: the pool fills for all, from what was left of this part."""
        self._fit(now, self.pool.level(now))
        self._pending = 0.0

    def _fit(self, now: float, level: float) -> None:
        limit = self.limit
        if self._replicas.cut_off:
            limit /= self._replicas.count
        # One request is always possible, if only seldom.
        self.pool.resize(now, max(1.0, limit), limit / _MINUTE_S, level=level)

    def _draw(self, now: float, amount: float) -> None:
        self.pool.draw(now, amount)
        self.held += amount
        if self._replicas.shared and amount:
            self._pending += amount
            self._changed()


class SlotShare(Share):
    """The share of a limit of concurrent requests: slots that this gateway has, of which some are in use.

    A slot that two gateways take at the same moment is one too many until the first of the two is free.
    """

    __slots__ = ("_peak", "_peers_slots", "in_use", "slots")

    def __init__(self, owner: str, limit: int, replicas: Replicas) -> None:
        super().__init__(owner, "slots", limit, replicas)
        self.in_use = 0
        self.slots = 0
        self._peers_slots: dict[str, int] = {}
        self._peak = 0

    def offer(self, now: float, need: int) -> bool:
        """Whether a slot can be used; takes some where there is none left."""
        assert need == 1
        self._wanted_at = now
        if self._replicas.cut_off:
            return self.in_use < max(1, self.limit // self._replicas.count)
        if not self._replicas.shared:
            return self.in_use < self.limit
        if self.in_use < self.slots:
            return True
        free = self.limit - self.slots - sum(self._peers_slots.values())
        if free < 1 or not self._may_draw(now):
            return False
        self.slots += max(1, int(free * self._portion(now)))
        self._drew_at = now
        self._changed()
        return True

    def occupy(self) -> None:
        """Uses a slot."""
        self.in_use += 1
        self._peak = max(self._peak, self.in_use)
        self.slots = max(self.slots, self.in_use)

    def vacate(self) -> None:
        """Ends the use of a slot."""
        assert self.in_use > 0
        self.in_use -= 1

    def tick(self, now: float) -> None:
        """Gives back the slots that were not in use since the last tick."""
        keep, self._peak = self._peak, self.in_use
        if self.slots > keep:
            self.slots = keep
            self._changed()
        self._tick(now)

    def wait_s(self, now: float, need: int) -> float:
        """When a request will end is not known."""
        assert need == 1
        return max(RETRY_AFTER_S, self._drew_at + QUOTA_ROUND_S - now)

    def idle(self, now: float) -> bool:
        """Whether a new share would be just like this one."""
        return not (self.active(now) or self.slots or any(self._peers_slots.values()))

    def news(self, now: float) -> Part:
        """How many slots are here."""
        self._told(now)
        return self._part(now, self.slots)

    def hear(self, now: float, sender: str, part: Part) -> None:  # noqa: ARG002 - slots do not flow
        """Another gateway has so many slots now."""
        self._heard(sender, part)
        self._peers_slots[sender] = round(part.amount)

    def forget(self, peer: str) -> None:
        """A gateway has gone, and its slots with it."""
        super().forget(peer)
        self._peers_slots.pop(peer, None)
