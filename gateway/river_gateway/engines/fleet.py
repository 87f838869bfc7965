"""The engines as this gateway sees them: their records, what it has there itself, and what came of it."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from river_gateway.engines.health import Breaker
from river_gateway.engines.routing import EngineState, Question, choose_engine
from river_gateway.limits import (
    ENGINES_REMEMBERED_MAX,
    PLACEMENT_REMEMBERED_S,
    PLACEMENTS_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator

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


class Fleet:
    """Chooses engines, and learns from what happens there. Times are those of `clock`, in seconds."""

    def __init__(self, engines: KnownEngines, clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engines
        self._clock = clock
        self._tokens: dict[str, int] = {}
        self._breakers: dict[str, Breaker] = {}
        self._resident: dict[str, tuple[EngineRecord, frozenset[str]]] = {}
        self._placements: OrderedDict[str, _Placement] = OrderedDict()
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

    @contextmanager
    def occupied(self, engine_id: str, tokens: int) -> Generator[None]:
        """Counts a request on an engine while the block runs."""
        self.enter(engine_id, tokens)
        try:
            yield
        finally:
            self.leave(engine_id, tokens)

    def enter(self, engine_id: str, tokens: int) -> None:
        """A request goes to an engine; `leave` must follow."""
        if self._breakers and (breaker := self._breakers.get(engine_id)) is not None:
            breaker.begin(self._clock())
        self._tokens[engine_id] = self._tokens.get(engine_id, 0) + tokens

    def leave(self, engine_id: str, tokens: int) -> None:
        """A request is over."""
        left = self._tokens[engine_id] - tokens
        assert left >= 0
        if left:
            self._tokens[engine_id] = left
        else:
            del self._tokens[engine_id]
        if self._breakers and (breaker := self._breakers.get(engine_id)) is not None:
            breaker.give_up()

    def succeeded(self, engine_id: str) -> None:
        """The engine answered, be it with a refusal."""
        if self._breakers:
            self._breakers.pop(engine_id, None)

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
        loading = engine_id == placed and not resident
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
        self._placements[adapter] = _Placement(engine_id, until)
        self._placements.move_to_end(adapter)
        if len(self._placements) > PLACEMENTS_MAX:
            self._placements.popitem(last=False)

    def _placed(self, adapter: str | None) -> str | None:
        placement = self._placements.get(adapter) if adapter is not None else None
        return placement.engine_id if placement and self._clock() < placement.until else None
