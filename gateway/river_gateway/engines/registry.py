"""Who is out there: the records that engines and trainers keep in a NATS KV bucket, watched."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import msgspec

from river_engine.protocol import ENGINES_BUCKET, EngineRecord
from river_engine.protocol import HEARTBEAT_LOST_AFTER_S as ENGINE_LOST_AFTER_S
from river_gateway.bus import BusError, NoBucketError
from river_gateway.limits import WATCH_RETRY_S, WATCH_SILENCE_S
from river_trainer.protocol import HEARTBEAT_LOST_AFTER_S as TRAINER_LOST_AFTER_S
from river_trainer.protocol import TRAINERS_BUCKET, TrainerRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, KeysView

    from river_gateway.bus import Bus, Change

logger = logging.getLogger("river.gateway")


class Record(Protocol):
    """What engines' and trainers' records have in common."""

    @property
    def base_model(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_lora_rank(self) -> int: ...
    @property
    def heartbeat_at(self) -> float: ...


RecordType = TypeVar("RecordType", bound=Record)


class Registry(Generic[RecordType]):
    """A snapshot of one bucket, kept current by `watch`.

    The newest record of each base model is remembered even after its writer has gone: a base that exists but has nobody
    alive is 503, one never heard of 404.
    """

    def __init__(
        self, bus: Bus, *, bucket: str, kind: type[RecordType], lost_after_s: float
    ) -> None:
        self._bus = bus
        self._bucket = bucket
        self._kind = kind
        self._lost_after_s = lost_after_s
        self._records: dict[str, RecordType] = {}
        self._last_of_base: dict[str, RecordType] = {}
        self.loaded = False  # whether the bucket has been read to its end once

    def alive(self, base_model: str | None = None) -> list[RecordType]:
        """The records with a recent heartbeat, of one base model or of all."""
        now = self._bus.heard_until(time.time(), self._lost_after_s)
        return [
            record
            for record in self._records.values()
            if now - record.heartbeat_at < self._lost_after_s
            and base_model in (None, record.base_model)
        ]

    @property
    def deaf(self) -> bool:
        """Whether heartbeats may be late because NATS is away, or has just come back."""
        now = time.time()
        return self._bus.heard_until(now, self._lost_after_s) != now

    def last_of(self, base_model: str) -> RecordType | None:
        """The newest record of a base model, whether its writer is alive or not."""
        return self._last_of_base.get(base_model)

    def bases(self) -> KeysView[str]:
        """Every base model ever heard of."""
        return self._last_of_base.keys()

    async def watch(self) -> None:
        """Follows the bucket until cancelled, through its creation, loss and return."""
        while True:
            try:
                async with self._bus.watching(self._bucket, WATCH_SILENCE_S) as changes:
                    await self._apply(changes)
            except NoBucketError:
                self.loaded = True  # Nobody has ever registered.
            except BusError as error:
                logger.debug("watching %s: %s", self._bucket, error)
            await asyncio.sleep(WATCH_RETRY_S)

    async def _apply(self, changes: AsyncIterator[Change | None]) -> None:
        """Applies changes until they end. The old snapshot stands until all of the bucket has come."""
        records: dict[str, RecordType] = {}
        async for change in changes:
            if change is None:
                self._records = records
                self.loaded = True
                continue
            record = self._decode(change) if change.value is not None else None
            if record is None:
                records.pop(change.key, None)
            else:
                records[change.key] = record
                self._remember(record)

    def _decode(self, change: Change) -> RecordType | None:
        try:
            return msgspec.msgpack.decode(change.value or b"", type=self._kind)
        except msgspec.DecodeError as error:
            logger.error("unreadable record %s in bucket %s: %s", change.key, self._bucket, error)  # noqa: TRY400 - the trace says nothing more
            return None

    def _remember(self, record: RecordType) -> None:
        known = self._last_of_base.get(record.base_model)
        if known is None or known.heartbeat_at <= record.heartbeat_at:
            self._last_of_base[record.base_model] = record


class Engines(Registry[EngineRecord]):
    """The engines, each known by its URL too."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(
            bus, bucket=ENGINES_BUCKET, kind=EngineRecord, lost_after_s=ENGINE_LOST_AFTER_S
        )

    def lost_of(self, urls: Collection[str]) -> set[str]:
        """Those of the URLs where no engine has a recent heartbeat; none while that says nothing, as NATS was away."""
        if not urls or not self.loaded or self.deaf:
            return set()
        return {*urls} - {record.url for record in self.alive()}


class Trainers(Registry[TrainerRecord]):
    """The trainers."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(
            bus, bucket=TRAINERS_BUCKET, kind=TrainerRecord, lost_after_s=TRAINER_LOST_AFTER_S
        )
