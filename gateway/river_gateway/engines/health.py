"""Which engines to leave alone for a while: a circuit breaker for each, by this gateway's own experience."""

from __future__ import annotations

from dataclasses import dataclass

from river_gateway.limits import (
    BREAKER_FAILURES,
    BREAKER_PAUSE_MAX_S,
    BREAKER_PAUSE_MIN_S,
)


@dataclass(slots=True)
class Breaker:
    """Opens after some failures in a row, for a pause that doubles each time; then one request may try.

    Times are monotonic seconds, given by the caller.
    """

    _failures: int = 0
    _open_until: float = 0.0
    _trying: bool = False

    def is_open(self, now: float) -> bool:
        """Whether the engine is to be left alone: it failed lately, or another request is just trying it again."""
        if self._failures < BREAKER_FAILURES:
            return False
        return self._trying or now < self._open_until

    def begin(self, now: float) -> None:
        """A request goes to the engine."""
        if self._failures >= BREAKER_FAILURES and now >= self._open_until:
            self._trying = True

    def succeed(self) -> None:
        """The engine answered, be it with a refusal."""
        self._failures = 0
        self._trying = False

    def fail(self, now: float) -> None:
        """The engine could not be reached, broke off, or failed by its own word."""
        self._failures += 1
        self._trying = False
        if self._failures >= BREAKER_FAILURES:
            doublings = min(self._failures - BREAKER_FAILURES, 16)
            self._open_until = now + min(BREAKER_PAUSE_MIN_S * 2**doublings, BREAKER_PAUSE_MAX_S)

    def give_up(self) -> None:
        """The request ended without saying anything about the engine: its client left."""
        self._trying = False
