"""Which engine answers: a pure function of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from river_engine.protocol import EngineRecord


def choose_engine(
    engines: Iterable[EngineRecord],
    *,
    base_model: str,
    adapter: str | None,
    in_flight: Mapping[str, int],
    excluded: Collection[str] = (),
) -> EngineRecord | None:
    """The engine of `base_model` to ask, or None when there is none.

    An engine that holds the adapter comes first, then the one with the least outstanding: the greater of what the
    engine reported, which counts other gateways' requests but is seconds old, and of what we have there now. Equal ones
    are taken by id, so that an idle stack keeps its prefix cache in one place.
    """

    def rank(engine: EngineRecord) -> tuple[bool, int, str]:
        cold = adapter is not None and adapter not in engine.resident
        outstanding = max(engine.running, in_flight.get(engine.engine_id, 0))
        return (cold, outstanding, engine.engine_id)

    candidates = [
        engine
        for engine in engines
        if engine.base_model == base_model and engine.engine_id not in excluded
    ]
    return min(candidates, key=rank, default=None)
