"""The gateway's settings: one frozen struct, read once from the `RIVER_*` environment."""

from __future__ import annotations

from msgspec import Struct


class Settings(Struct, frozen=True, kw_only=True):
    """`engine_token` is the secret shared with the engines; `store_url` the root of all stored checkpoints."""

    nats_url: str
    postgres_url: str
    engine_token: str
    store_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
