"""The engines as this gateway sees them: their records, what it has there itself, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from river_gateway.engines.health import Breaker
from river_gateway.engines.routing import (
    EngineState,
    Question,
    choose_engine,
    choose_second,
)
from river_gateway.limits import (
    ENGINES_REMEMBERED_MAX,
    PLACEMENT_REMEMBERED_S,
    PLACEMENTS_MAX,
)
from river_gateway.lru import Lru

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from river_engine.protocol import EngineRecord


class KnownEngines(Protocol):
    """What is known of engines by their own word."""

    def alive(self, base_model: str | None = None) -> list[EngineRecord]:
        """The records with a recent heartbeat."""
        ...


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where an adapter has been sent to be loaded; believed until the engine has had time to report it."""

    engine_id: str
    until: float


@dataclass(slots=True)
class Visit:
    """A request that counts on its engine until it is closed."""

    fleet: Fleet
    engine_id: str
    tokens: int
    _closed: bool = False

    def close(self) -> None:
        """Closing it again does nothing."""
        if not self._closed:
            self._closed = True
            self.fleet.leave(self)


class Fleet:
    """Chooses engines, and learns from what happens there. Times are those of `clock`, in seconds."""

    def __init__(self, engines: KnownEngines, clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engines
        self._clock = clock
        self._tokens: dict[str, int] = {}
        self._breakers: dict[str, Breaker] = {}
        self._resident: dict[str, tuple[EngineRecord, frozenset[str]]] = {}
        self._placements: Lru[str, _Placement] = Lru(PLACEMENTS_MAX)
        self.visits = 0  # how many requests are on engines
        self.placed = 0  # how often an adapter got a place

    def choose(self, question: Question, excluded: Collection[str] = ()) -> EngineRecord | None:
        """The engine to ask, or None when there is none.

        An adapter that is loaded nowhere gets its place here: further requests follow, and it is loaded once.
        """
        chosen = choose_engine(self.snapshot(question), question, excluded=excluded)
        if chosen is None:
            return None
        if question.adapter is not None and not chosen.holds:
            self._place(question.adapter, chosen.record.engine_id)
        return chosen.record

    def choose_second(self, question: Question, excluded: Collection[str]) -> EngineRecord | None:
        """The engine for a copy of a request that the excluded ones have not answered, or None when there is none."""
        chosen = choose_second(self.snapshot(question), question, excluded=excluded)
        return None if chosen is None else chosen.record

    def snapshot(self, question: Question) -> list[EngineState]:
        """All engines of the base model in question."""
        placed = self._placed(question.adapter)
        return [
            self._state(record, question.adapter, placed)
            for record in self._engines.alive(question.base_model)
        ]

    def everybody(self) -> list[EngineState]:
        """All engines of all base models, for whoever looks on."""
        return [self._state(record, None, None) for record in self._engines.alive()]

    def is_failing(self, engine_id: str) -> bool:
        """Whether the engine is to be left alone."""
        breaker = self._breakers.get(engine_id)
        return breaker is not None and breaker.is_open(self._clock())

    def failing(self) -> list[str]:
        """The engines that are left alone."""
        now = self._clock()
        return [engine_id for engine_id, breaker in self._breakers.items() if breaker.is_open(now)]

    def visit(self, engine_id: str, tokens: int) -> Visit:
        """A request of about so many tokens goes to an engine."""
        if (breaker := self._breakers.get(engine_id)) is not None:
            breaker.begin(self._clock())
        self.visits += 1
        self._tokens[engine_id] = self._tokens.get(engine_id, 0) + tokens
        return Visit(self, engine_id, tokens)

    def leave(self, visit: Visit) -> None:
        """For `Visit.close`."""
        self.visits -= 1
        left = self._tokens.get(visit.engine_id, 0) - visit.tokens
        assert left >= 0
        if left:
            self._tokens[visit.engine_id] = left
        else:
            self._tokens.pop(visit.engine_id, None)
        if (breaker := self._breakers.get(visit.engine_id)) is not None:
            breaker.give_up()

    def succeeded(self, engine_id: str) -> None:
        """The engine answered, be it with a refusal."""
        if (breaker := self._breakers.get(engine_id)) is not None:
            breaker.succeed()

    def failed(self, engine_id: str, adapter: str | None) -> None:
        """The engine did not answer, or said that it cannot."""
        self._breakers.setdefault(engine_id, Breaker()).fail(self._clock())
        if len(self._breakers) > ENGINES_REMEMBERED_MAX:
            del self._breakers[next(iter(self._breakers))]
        placement = self._placements.get(adapter) if adapter is not None else None
        if placement is not None and placement.engine_id == engine_id:
            del self._placements[adapter or ""]

    def outstanding_tokens(self) -> dict[str, int]:
        """What this gateway has on each engine."""
        return dict(self._tokens)

    def _state(self, record: EngineRecord, adapter: str | None, placed: str | None) -> EngineState:
        engine_id = record.engine_id
        resident = adapter in self._residents(record)
        loading = not resident and (engine_id == placed or adapter in record.loading)
        return EngineState(
            record,
            outstanding_tokens=max(record.outstanding_tokens, self._tokens.get(engine_id, 0)),
            holds=resident or loading,
            loading=loading,
            failing=self.is_failing(engine_id),
        )

    def _residents(self, record: EngineRecord) -> frozenset[str]:
        known = self._resident.get(record.engine_id)
        if known is None or known[0] is not record:
            if len(self._resident) >= ENGINES_REMEMBERED_MAX:
                self._resident.clear()  # They are read again; most of these engines have gone.
            known = self._resident[record.engine_id] = (record, frozenset(record.resident))
        return known[1]

    def _place(self, adapter: str, engine_id: str) -> None:
        self.placed += 1
        until = self._clock() + PLACEMENT_REMEMBERED_S
        self._placements.put(adapter, _Placement(engine_id, until))

    def _placed(self, adapter: str | None) -> str | None:
        placement = self._placements.get(adapter) if adapter is not None else None
        return placement.engine_id if placement and self._clock() < placement.until else None
