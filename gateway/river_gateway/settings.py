"""The gateway's settings: one frozen struct, read once from the `RIVER_*` environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from river_gateway.limits import (
    COMPLETIONS_KEPT_S,
    SWEEP_GRACE_S,
    SWEEP_INTERVAL_S,
    USAGE_SPOOL_MAX_BYTES,
)


class Settings(Struct, frozen=True, kw_only=True):
    """`engine_token` is the secret shared with the engines; `store_url` the root of all stored checkpoints.

    The files of a checkpoint that has expired or was replaced go `sweep_grace_s` later; looked for every
    `sweep_interval_s`. `reload_file` is read on SIGHUP (`reload.py`). A stored completion is kept for
    `completions_kept_s`, unless its tenant says otherwise. A completion that an engine has not begun to answer after
    `hedge_after_ms` is asked of a second one as well; 0 means never. While NATS is away, usage is kept in
    `usage_spool_dir`, or a folder in `data_dir`, up to `usage_spool_max_bytes`; gateways of one machine may share it.
    Signed URLs begin with `public_url`, or else as the request for them did, and are signed with `url_secret`, or a
    secret that is kept in Postgres.
    The River dialect is served on `grpc_port` of the same host, 0 is not at all; with TLS if `grpc_certificate` and
    `grpc_key` name files in PEM.
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
    data_dir: str = ".river"
    usage_spool_dir: str | None = None
    usage_spool_max_bytes: Annotated[int, Meta(gt=0)] = USAGE_SPOOL_MAX_BYTES
    public_url: str | None = None
    url_secret: Annotated[str, Meta(min_length=16)] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    grpc_certificate: str | None = None
    grpc_key: str | None = None

    @property
    def usage_spool(self) -> Path:
        """Where usage waits for NATS."""
        return Path(self.usage_spool_dir or Path(self.data_dir) / "usage-spool")
