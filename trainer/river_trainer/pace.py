"""How fast a trainer is: what it has counted in all, and what of that fell into the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from river_trainer.limits import PACE_WINDOW_S


@dataclass(slots=True)
class Totals:
    """Since the start of the process; `seconds` by phase."""

    batches: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def copy(self) -> Totals:
        """As they are now."""
        return Totals(self.batches, self.steps, self.tokens, dict(self.seconds))

    def since(self, before: Totals) -> Totals:
        """What has been added."""
        return Totals(
            self.batches - before.batches,
            self.steps - before.steps,
            self.tokens - before.tokens,
            {name: spent - before.seconds.get(name, 0.0) for name, spent in self.seconds.items()},
        )


class Pace:
    """Looks at `totals` now and then."""

    def __init__(self, totals: Totals, clock: Callable[[], float] = time.monotonic) -> None:
        self._totals = totals
        self._clock = clock
        self._seen: deque[tuple[float, Totals]] = deque([(clock(), totals.copy())])

    def look(self) -> tuple[float, Totals]:
        """The length of the window, seconds, and what fell into it: `PACE_WINDOW_S` or a little more, at first less."""
        now, totals = self._clock(), self._totals.copy()
        self._seen.append((now, totals))
        while len(self._seen) > 2 and now - self._seen[1][0] >= PACE_WINDOW_S:  # noqa: PLR2004 - its two ends
            self._seen.popleft()
        began, before = self._seen[0]
        return now - began, totals.since(before)
