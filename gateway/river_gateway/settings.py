"""The gateway's settings: one frozen struct, read once from the `RIVER_*` environment."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from river_gateway.limits import COMPLETIONS_KEPT_S, SWEEP_GRACE_S, SWEEP_INTERVAL_S


class Settings(Struct, frozen=True, kw_only=True):
    """`engine_token` is the secret shared with the engines; `store_url` the root of all stored checkpoints.

    The files of a checkpoint that has expired or was replaced go `sweep_grace_s` later; looked for every
    `sweep_interval_s`. `reload_file` is read on SIGHUP (`reload.py`). A stored completion is kept for
    `completions_kept_s`, unless its tenant says otherwise. A completion that an engine has not begun to answer after
    `hedge_after_ms` is asked of a second one as well; 0 means never.
    """

    nats_url: str
    postgres_url: str
    engine_token: str
    store_url: str | None = None
    reload_file: str | None = None
    completions_kept_s: float = COMPLETIONS_KEPT_S
    sweep_interval_s: float = SWEEP_INTERVAL_S
    sweep_grace_s: float = SWEEP_GRACE_S
    hedge_after_ms: Annotated[float, Meta(ge=0)] = 0.0
    host: str = "127.0.0.1"
    port: int = 8000
