"""Ways to choose an engine: River's own, as the gateway runs it, and what others do."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from river_engine.protocol import HEARTBEAT_LOST_AFTER_S, EngineRecord
from river_gateway.engines.fleet import Fleet, Visit
from river_gateway.engines.routing import Question
from river_gateway.limits import COMPLETION_GUESS_TOKENS, ROUTING_PREFIX_BYTES
from river_ops.bench.routing.engine import BASE
from river_ops.bench.routing.traffic import Request


class Directory:
    """The records that engines have sent: what every gateway knows, up to a heartbeat old."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.records: dict[str, EngineRecord] = {}

    def alive(self, base_model: str | None = None) -> list[EngineRecord]:
        """Those that are not lost yet."""
        assert base_model in (None, BASE)
        heard_after_s = self.now_s - HEARTBEAT_LOST_AFTER_S
        return [record for record in self.records.values() if record.heartbeat_at > heard_after_s]


class Chooser(Protocol):
    """What one gateway knows and decides."""

    def choose(self, request: Request, excluded: Collection[str], /) -> str | None:
        """The engine to ask, or None when there is none."""
        ...

    def sent(self, request: Request, engine_id: str, /) -> None:
        """A request has gone to an engine."""

    def over(self, request: Request, /) -> None:
        """It is no longer there."""

    def failed(self, request: Request, engine_id: str, /) -> None:
        """The engine could not be reached, or broke off."""


class ByFleet(Chooser):
    """River's gateway: by adapter, prefix and load; without `with_reasons`, by load alone."""

    def __init__(self, directory: Directory, *, with_reasons: bool) -> None:
        self._fleet = Fleet(directory, lambda: directory.now_s)
        self._with_reasons = with_reasons
        self._visits: dict[Request, Visit] = {}

    def choose(self, request: Request, excluded: Collection[str], /) -> str | None:
        question = Question(BASE)
        if self._with_reasons:
            beginning = request.system_prompt.encode().ljust(ROUTING_PREFIX_BYTES)
            question = Question(BASE, request.adapter, beginning)
        record = self._fleet.choose(question, excluded)
        return record.engine_id if record else None

    def sent(self, request: Request, engine_id: str, /) -> None:
        tokens = request.prompt_tokens + COMPLETION_GUESS_TOKENS
        self._visits[request] = self._fleet.visit(engine_id, tokens)

    def over(self, request: Request, /) -> None:
        self._visits.pop(request).close()

    def failed(self, request: Request, engine_id: str, /) -> None:
        self._fleet.failed(engine_id, request.adapter)


class ByChance(Chooser):
    """Any engine."""

    def __init__(self, directory: Directory, *, seed: int) -> None:
        self._directory = directory
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret

    def choose(self, _request: Request, excluded: Collection[str], /) -> str | None:
        able = _able(self._directory, excluded)
        return self._chance.choice(able) if able else None


class InTurn(Chooser):
    """One engine after another."""

    def __init__(self, directory: Directory, *, start: int) -> None:
        self._directory = directory
        self._next = start

    def choose(self, _request: Request, excluded: Collection[str], /) -> str | None:
        able = _able(self._directory, excluded)
        self._next += 1
        return able[self._next % len(able)] if able else None


def _able(directory: Directory, excluded: Collection[str]) -> list[str]:
    return [
        record.engine_id
        for record in directory.alive()
        if not record.draining and record.engine_id not in excluded
    ]


MakeChooser = Callable[[Directory, int], Chooser]

CHOOSERS: Mapping[str, MakeChooser] = {
    "river": lambda directory, _gateway: ByFleet(directory, with_reasons=True),
    "least_outstanding": lambda directory, _gateway: ByFleet(directory, with_reasons=False),
    "round_robin": lambda directory, gateway: InTurn(directory, start=gateway),
    "random": lambda directory, gateway: ByChance(directory, seed=gateway),
}
"""By name; the second argument is the number of the gateway that chooses."""
