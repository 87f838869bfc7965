"""Which engine answers: a pure function of a snapshot.

1. Engines of the base model that take new requests; those that lately failed only if there is no other.
2. Of these, the ones that hold the adapter. If none does, or all that do are crowded while others are not, one more is
   chosen to load it: the first with room in an order that follows from the adapter's name alone, so that every gateway
   sends it to the same place and few adapters move when engines come and go. While one is loading it, no other is asked
   to: many first requests load it once.
3. Of several, the first with room in an order that follows from the prompt's beginning, whose blocks its prefix cache
   may hold.

A request that takes long may be asked of a second engine as well (`choose_second`): only of one that could begin at
once, for a copy must not cost more than it saves.

An engine has room while it has no more than its share of the outstanding tokens and a bit: consistent hashing with
bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018), where the order is that of rendezvous hashing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from river_gateway.limits import (
    ROUTING_CROWDED_FACTOR,
    ROUTING_CROWDED_SLACK_TOKENS,
    ROUTING_ROOM_FACTOR,
    ROUTING_SLACK_TOKENS,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from river_engine.protocol import EngineRecord

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_MULTIPLIER = 0x9E37_79B9_7F4A_7C15


@dataclass(frozen=True, slots=True)
class EngineState:
    """One engine as a gateway sees it.

    `outstanding_tokens` is the greater of what the engine reported, which counts other gateways' requests but is
    seconds old, and of what this gateway has there now. `holds` says whether it has loaded the adapter in question, or
    is `loading` it; `failing`, whether it lately did nothing but fail.
    """

    record: EngineRecord
    outstanding_tokens: int = 0
    holds: bool = False
    loading: bool = False
    failing: bool = False

    @property
    def engine_id(self) -> str:
        """The engine's name."""
        return self.record.engine_id


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be answered: by a base model or an adapter on it.

    `affinity` is the same for requests that may share cached blocks: the tenant and the prompt's beginning.
    """

    base_model: str
    adapter: str | None = None
    affinity: bytes = b""


def choose_engine(
    engines: Iterable[EngineState], question: Question, *, excluded: Collection[str] = ()
) -> EngineState | None:
    """The engine to ask, or None when there is none."""
    able = [
        engine for engine in _able(engines, question) if engine.record.engine_id not in excluded
    ]
    able = [engine for engine in able if not engine.failing] or able
    if len(able) <= 1:
        return able[0] if able else None
    if question.adapter is not None:
        holders = [engine for engine in able if engine.holds]
        others = [engine for engine in able if not engine.holds]
        if _crowded(holders, others):
            return _first_with_room(others, question.adapter.encode())
        able = holders
    return _first_with_room(able, question.affinity)


def choose_second(
    engines: Iterable[EngineState], question: Question, *, excluded: Collection[str]
) -> EngineState | None:
    """The engine for a copy of a request that the `excluded` ones have not answered yet; None when there is none.

    It holds the adapter, does not fail, and has room among all that could answer.
    """
    able = [
        engine
        for engine in _able(engines, question)
        if not engine.failing
        and (question.adapter is None or (engine.holds and not engine.loading))
    ]
    with_room = [engine for engine in _with_room(able) if engine.record.engine_id not in excluded]
    return _first(with_room, question.affinity) if with_room else None


def _able(engines: Iterable[EngineState], question: Question) -> list[EngineState]:
    """Those that have the base model and take new requests."""
    return [
        engine
        for engine in engines
        if engine.record.base_model == question.base_model and not engine.record.draining
    ]


def _crowded(holders: Sequence[EngineState], others: Sequence[EngineState]) -> bool:
    """Whether it is worth loading an adapter once more: its holders have several times what others have to do."""
    if not others or any(engine.loading for engine in holders):
        return False
    mean_tokens = sum(engine.outstanding_tokens for engine in others) / len(others)
    limit_tokens = ROUTING_CROWDED_FACTOR * mean_tokens + ROUTING_CROWDED_SLACK_TOKENS
    return all(engine.outstanding_tokens > limit_tokens for engine in holders)


def _first_with_room(engines: Sequence[EngineState], key: bytes) -> EngineState:
    """The first in the key's order that has no more than its share and a bit; the least loaded always has."""
    return engines[0] if len(engines) == 1 else _first(_with_room(engines), key)


def _with_room(engines: Sequence[EngineState]) -> list[EngineState]:
    total = sum(engine.outstanding_tokens for engine in engines)
    room_tokens = ROUTING_ROOM_FACTOR * total / max(1, len(engines)) + ROUTING_SLACK_TOKENS
    return [engine for engine in engines if engine.outstanding_tokens <= room_tokens]


def _first(engines: Sequence[EngineState], key: bytes) -> EngineState:
    """The first in the key's order; without a key, the least loaded."""
    if not key:
        return min(engines, key=lambda engine: (engine.outstanding_tokens, engine.engine_id))
    hashed = int.from_bytes(blake2b(key, digest_size=8).digest())
    return max(engines, key=lambda engine: _score(hashed, engine.engine_id))


def _score(hashed: int, engine_id: str) -> tuple[int, str]:
    """The engine's place in a key's order: pseudo-random, independent of all other engines."""
    mixed = ((hashed ^ _seed(engine_id)) * _MULTIPLIER) & _WORD
    mixed ^= mixed >> 32
    return ((mixed * _MULTIPLIER) & _WORD, engine_id)


@lru_cache(maxsize=4096)
def _seed(engine_id: str) -> int:
    return int.from_bytes(blake2b(engine_id.encode(), digest_size=8).digest())
