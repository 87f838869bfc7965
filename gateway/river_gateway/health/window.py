"""Counting requests: on the way of every one of them, so it does next to nothing."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

from river_gateway.health.slots import (
    BOUNDS_S,
    SLOT_S,
    STREAM_BROKEN,
    Failure,
    Outcome,
    Series,
    Slot,
    outcome_of,
)
from river_gateway.limits import (
    HEALTH_FAILURES_MAX,
    HEALTH_MESSAGE_MAX_CHARS,
    HEALTH_SERIES_MAX,
    HEALTH_SLOTS_UNSENT_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from river_gateway.context import RequestContext

OTHER = "others"
"""The series of whatever came when there were `HEALTH_SERIES_MAX` already."""
_APIS = (("/v1", "OpenAI API"), ("/river/v1", "River API"), ("/api/v1", "Tinker API"))


class Tally:
    """What is being counted; the same as a `Series`, but quick to add to."""

    __slots__ = ("first", "statuses", "whole")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.whole: dict[int, int] = {}

    def frozen(self) -> Series:
        """As it is now."""
        return Series(statuses=dict(self.statuses), first=dict(self.first), whole=dict(self.whole))

    def add(self, other: Tally) -> None:
        """Takes in another."""
        for own, others in (
            (self.statuses, other.statuses),
            (self.first, other.first),
            (self.whole, other.whole),
        ):
            for key, count in others.items():
                own[key] = own.get(key, 0) + count


class Window:
    """The running slot of this gateway and those that have not been sent yet, at most so many."""

    def __init__(self, gateway_id: str, clock: Callable[[], float] = time.time) -> None:
        self._gateway_id = gateway_id
        self._clock = clock
        self._number = int(clock() / SLOT_S)
        self._ends_at = (self._number + 1) * SLOT_S
        self._tallies: dict[str, Tally] = {}
        self._failures: deque[Failure] = deque(maxlen=HEALTH_FAILURES_MAX)
        self._names: dict[str, str | None] = {}
        self._ended: deque[Slot] = deque(maxlen=HEALTH_SLOTS_UNSENT_MAX)
        self.totals: dict[str, Tally] = {}
        """Of all slots that have ended, for Prometheus."""

    def count(self, context: RequestContext, route: str, elapsed_s: float) -> None:
        """One request to a route, a template, has ended."""
        name = context.base_model or self._name_of(route)
        if name is None:
            return
        if self._clock() >= self._ends_at:
            self.turn()
        status = STREAM_BROKEN if context.broken else context.status
        self.note(name, status, elapsed_s, context.first_token_s)
        if context.problem is not None and outcome_of(status) is Outcome.FAILED:
            self._failures.append(
                Failure(
                    at=self._clock(),
                    name=name,
                    route=route,
                    status=status,
                    message=context.problem[:HEALTH_MESSAGE_MAX_CHARS],
                    request_id=context.request_id,
                )
            )

    def note(self, name: str, status: int, elapsed_s: float, first_token_s: float | None) -> None:
        """One more request of a series."""
        tally = self._tallies.get(name)
        if tally is None:
            if len(self._tallies) >= HEALTH_SERIES_MAX:
                name = OTHER
            tally = self._tallies.setdefault(name, Tally())
        statuses, whole = tally.statuses, tally.whole
        statuses[status] = statuses.get(status, 0) + 1
        bucket = bisect_left(BOUNDS_S, elapsed_s)
        whole[bucket] = whole.get(bucket, 0) + 1
        if first_token_s is not None:
            first, bucket = tally.first, bisect_left(BOUNDS_S, first_token_s)
            first[bucket] = first.get(bucket, 0) + 1

    def turn(self) -> None:
        """Ends the running slot if its time is over."""
        number = int(self._clock() / SLOT_S)
        if number == self._number:
            return
        self._ended.append(
            Slot(
                gateway_id=self._gateway_id,
                number=self._number,
                series={name: tally.frozen() for name, tally in self._tallies.items()},
                failures=list(self._failures),
            )
        )
        for name, tally in self._tallies.items():
            self.totals.setdefault(name, Tally()).add(tally)
        self._tallies = {}
        self._failures.clear()
        self._number = number
        self._ends_at = (number + 1) * SLOT_S

    def take_ended(self) -> list[Slot]:
        """The slots that ended since this was asked last, oldest first."""
        self.turn()
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _name_of(self, route: str) -> str | None:
        """The API of a route, None of one that is not counted; routes are templates, and few."""
        try:
            return self._names[route]
        except KeyError:
            found = [
                api for prefix, api in _APIS if route == prefix or route.startswith(f"{prefix}/")
            ]
            name = self._names[route] = found[0] if found else None
            return name
