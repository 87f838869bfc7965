"""What the load tool and the stand-in engine are told, and what they answer."""

from __future__ import annotations

from msgspec import Struct

PACED_USER = "paced"
"""Streams of this user come token by token."""


class StubSettings(Struct, frozen=True, kw_only=True):
    """Without `nats_url` it does not register."""

    nats_url: str | None = None


class Listening(Struct, frozen=True, kw_only=True):
    """Where it answers; the first line it prints."""

    url: str


class LoadSettings(Struct, frozen=True, kw_only=True):
    """`rate` in requests per second; ends after `requests` of them or `seconds`, whatever is given.

    `stream` asks for streams, `paced` for those whose tokens come one by one. `max_tokens` is for a real engine,
    which with `whole_length` produces them all.
    """

    port: int
    model: str
    api_key: str
    connections: int
    seconds: float | None = None
    requests: int | None = None
    rate: float | None = None
    stream: bool = False
    paced: bool = False
    max_tokens: int = 64
    whole_length: bool = False


class LoadResult(Struct, frozen=True, kw_only=True):
    """Milliseconds from sending a request to the first byte of its answer's body, and to its end.

    `errors` are answers with another status than 200, and lost connections. `events` are those of streams.
    """

    requests: int
    errors: int
    seconds: float
    events: int
    p50_ms: float
    p99_ms: float
    first_byte_p50_ms: float
    first_byte_p99_ms: float
    first_error: str | None = None

    @property
    def requests_per_s(self) -> float:
        """Answers per second."""
        return self.requests / self.seconds
