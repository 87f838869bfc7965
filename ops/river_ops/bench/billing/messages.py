"""What is said to and by this benchmark's programs."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

PUBLISHER = "river_ops.bench.billing.publisher"
PEER = "river_ops.bench.billing.peer"
PROGRAM_TIMEOUT_S = 300.0

Way = Literal["insert_per_event", "executemany"]
WAYS: tuple[Way, ...] = ("insert_per_event", "executemany")


class PublisherSettings(Struct, frozen=True, kw_only=True):
    """`events_per_s` of None is as fast as JetStream stores them."""

    nats_url: str
    events: int
    seed: int
    began_at: float
    group: int
    events_per_s: float | None = None


class Published(Struct, frozen=True, kw_only=True):
    """What was stored, and how long that took."""

    events: int
    messages: int
    seconds: float


class PeerSettings(Struct, frozen=True, kw_only=True):
    """Which way, and between which servers."""

    way: Way
    nats_url: str
    postgres_url: str


class PeerDone(Struct, frozen=True, kw_only=True):
    """How many events this process wrote."""

    events: int
