"""Several gateways' limits in a world of its own: time goes in steps, and announcements take theirs."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import msgspec

from river_client.wire import Limits
from river_gateway.errors import RateLimitedError
from river_gateway.limits import QUOTA_TICK_S
from river_gateway.tenancy.auth import Principal
from river_gateway.tenancy.messages import Announcement
from river_gateway.tenancy.quotas import Quotas, Ticket

STEP_S = 0.01


def principal(
    limits: Limits | None = None, tenant_limits: Limits | None = None, key_id: str = "key_1"
) -> Principal:
    """A key with limits."""
    return Principal("ten_1", key_id, frozenset({"infer"}), None, limits, tenant_limits)


def admitted(quotas: Quotas, who: Principal, tokens: int = 0) -> Ticket | None:
    """The ticket of a request, None if it was refused."""
    try:
        return quotas.admit(who, tokens)
    except RateLimitedError:
        return None


@dataclass
class World:
    """`count` gateways that hear each other `latency_s` later, at most; `cut` are those that nobody hears."""

    count: int
    latency_s: float = 0.02
    seed: int = 0
    now: float = 1000.0
    cut: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.gateways: list[Quotas] = []
        self._under_way: list[deque[tuple[float, bytes]]] = []
        self._ticks_at: list[float] = []
        for _ in range(self.count):
            self.start()
        self.go_on(0.5)

    def start(self) -> Quotas:
        """One more gateway."""
        number = len(self.gateways)
        quotas = Quotas(f"gw_{number}", clock=lambda: self.now)
        self.gateways.append(quotas)
        self._under_way.append(deque())
        self._ticks_at.append(self.now + self._random.random() * QUOTA_TICK_S)
        self._send(number)
        return quotas

    def step(self) -> None:
        """One step of time, in which everybody hears, ticks and speaks."""
        self.now += STEP_S
        for messages in self._under_way:
            while messages and messages[0][0] <= self.now:
                announcement = msgspec.msgpack.decode(messages.popleft()[1], type=Announcement)
                for number, quotas in enumerate(self.gateways):
                    if number not in self.cut:
                        quotas.hear(announcement)
        for number, quotas in enumerate(self.gateways):
            ticks = self.now >= self._ticks_at[number]
            if ticks:
                quotas.tick(connected=number not in self.cut)
                self._ticks_at[number] += QUOTA_TICK_S
            if ticks or quotas.replicas.news or quotas.replicas.asking:
                self._send(number)

    def go_on(self, seconds: float) -> None:
        """Lets time pass."""
        for _ in range(round(seconds / STEP_S)):
            self.step()

    def _send(self, number: int) -> None:
        if number in self.cut:
            return
        messages = self._under_way[number]
        for announcement in self.gateways[number].announcements():
            at = self.now + self._random.random() * self.latency_s
            # A connection keeps the order.
            at = max(at, messages[-1][0] if messages else at)
            messages.append((at, msgspec.msgpack.encode(announcement)))
