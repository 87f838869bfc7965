"""Waiting for one's turn: the asynchronous side of `admission.py`.

A request joins with all its prompts at once, or is refused at once, before its adapter is fetched. Each prompt then
waits for its turn, has its adapter loaded if need be, and stays inside until vLLM has let go of all that it generates.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.lora.request import LoRARequest

from river_engine.adapters import AdapterStore, Version
from river_engine.admission import Admission, Bounds, QueueFullError, Turn
from river_engine.counting import generating
from river_engine.errors import EngineDraining, EngineFull
from river_engine.limits import RETRY_AFTER_MAX_S

_refused = Counter("river_engine_refused", "Requests refused at the door.", ["reason"])
_waited = Histogram(
    "river_engine_wait_seconds",
    "From arrival until vLLM had the request.",
    buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)


class Turnstile:
    """Where requests to one engine queue."""

    def __init__(self, bounds: Bounds, store: AdapterStore) -> None:
        self._admission = Admission(bounds)
        self._store = store
        self._calls: dict[Turn, asyncio.Future[None]] = {}
        self.draining = False

    @property
    def admission(self) -> Admission:
        return self._admission

    @contextmanager
    def joined(self, turns: list[Turn], *, ready: bool = True) -> Iterator[None]:
        """In the block, the turns of one request are in the queue or inside; `ready` if their adapter is here.

        Raises:
            EngineFull: there is no room for another request to wait.
            EngineDraining: the engine is about to stop.
        """
        if self.draining:
            _refused.labels(reason="draining").inc()
            raise EngineDraining("the engine is about to stop", retry_after_s=1)
        try:
            self._admission.arrive(turns, time.monotonic(), ready=ready)
        except QueueFullError as error:
            _refused.labels(reason="busy").inc()
            retry_after_s = min(max(1, math.ceil(error.retry_after_s)), RETRY_AFTER_MAX_S)
            raise EngineFull(f"{error}", retry_after_s=retry_after_s) from error
        for turn in turns:
            self._calls[turn] = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            yield
        finally:
            self._leave(*turns)

    def fetched(self, turns: list[Turn]) -> None:
        """The adapter of turns that joined without it is here."""
        self._admission.fetched(turns)
        self._advance()

    async def called(self, turn: Turn) -> None:
        """Waits for a turn that has joined."""
        await self._calls[turn]

    @asynccontextmanager
    async def inside(
        self, turn: Turn, version: Version | None
    ) -> AsyncIterator[LoRARequest | None]:
        """Waits for a turn that has joined; in the block it may use vLLM, with what is yielded. Once only.

        Raises:
            EngineRefusal: the adapter cannot be loaded.
        """
        await self.called(turn)
        _waited.observe(time.monotonic() - turn.arrived_at)
        try:
            if version is None:
                async with generating(turn):
                    yield None
            else:
                async with self._store.loaded(version) as lora, generating(turn):
                    yield lora
        finally:
            self._leave(turn)

    def close(self) -> None:
        """Takes no new requests from now on."""
        self.draining = True

    def open(self) -> None:
        """Takes requests again."""
        self.draining = False

    def _advance(self) -> None:
        for turn in self._admission.advance(time.monotonic()):
            call = self._calls[turn]
            if not call.done():  # Else its owner has been cancelled and is about to leave.
                call.set_result(None)

    def _leave(self, *turns: Turn) -> None:
        left = [turn for turn in turns if self._calls.pop(turn, None) is not None]
        for turn in left:
            self._admission.leave(turn)
        if left:
            self._advance()


class AdmissionMetrics(Collector):
    """What `/metrics` says of the queue, and of whether it takes anybody, when it is asked."""

    def __init__(self, turnstile: Turnstile, slots: int, registry: CollectorRegistry) -> None:
        self._turnstile = turnstile
        self._slots = slots
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        admission = self._turnstile.admission
        waiting = GaugeMetricFamily(
            "river_engine_waiting", "Prompts that wait, by what for.", labels=["reason"]
        )
        for reason, count in admission.waiting().items():
            waiting.add_metric([reason.value], count)
        yield waiting
        for name, help_text, value in (
            ("inside", "Prompts that vLLM is working on.", admission.turns_inside()),
            ("slots_used", "Adapter slots in use.", admission.slots_used()),
            ("slots", "Adapter slots.", self._slots),
            ("draining", "1 while nothing new is taken.", self._turnstile.draining),
            (
                "outstanding_tokens",
                "Tokens not yet computed, by estimate.",
                admission.outstanding_tokens(),
            ),
        ):
            yield GaugeMetricFamily(f"river_engine_{name}", help_text, value=value)
