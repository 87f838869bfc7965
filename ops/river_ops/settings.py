"""What the launcher is told: by flags, or by `RIVER_*` variables of the same names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from river_ops.models import TINY_MOE, TINY_MOE_NAME

DEFAULT_PORT = 8700


class ExternalServers(msgspec.Struct, frozen=True, kw_only=True):
    """Servers that somebody else runs; an empty URL means that we start our own."""

    postgres_url: str = ""
    nats_url: str = ""
    store_url: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: the name that users call it by, and where its weights are (a directory or a hub id)."""

    name: str
    path: str


TINY_BASE = Base(name=TINY_MOE_NAME, path=str(TINY_MOE))


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What `river up` starts.

    `port` 0 asks for a free one; `grpc_port` is by default the one after it, or a free one as well.
    """

    data_directory: Path
    port: int = DEFAULT_PORT
    grpc_port: int | None = None
    bases: tuple[Base, ...] = (TINY_BASE,)
    engines: int = 1
    trainers: int = 1
    durable: bool = True
    external: ExternalServers = field(default_factory=ExternalServers)


class StackInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A running stack as others find it, in `stack.json` of its data directory."""

    process_id: int
    base_url: str
    grpc_port: int
    admin_key: str
    postgres_url: str
    bases: list[str]
    engine_metrics_urls: list[str]
    trainer_metrics_urls: list[str]


def parse_base(text: str) -> Base:
    """A base from the command line: a directory is called by its own name, a hub id by itself."""
    path = Path(text)
    if path.is_dir():
        resolved = path.resolve()
        if resolved == TINY_MOE.resolve():
            return TINY_BASE
        return Base(name=resolved.name, path=str(resolved))
    return Base(name=text, path=text)
