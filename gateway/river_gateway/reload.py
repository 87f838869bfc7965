"""Settings that a running gateway takes anew on SIGHUP, without a stream or a request noticing.

They are read from the file `RIVER_RELOAD_FILE`, lines of `RIVER_NAME=value`, over the environment it was started with.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from river_client.service import SettingsError, read_settings

if TYPE_CHECKING:
    from river_gateway.services import Services

logger = logging.getLogger("river.gateway")


class Reloadable(Struct, frozen=True, kw_only=True):
    """`engine_token` may change: requests that are with an engine already stay there, new ones bring the new one."""

    engine_token: str


def reload_settings(services: Services) -> None:
    """Reads the file again; one that cannot be read, or has a mistake, changes nothing and says so in the log."""
    path = services.settings.reload_file
    if path is None:
        logger.info("nothing to reload: RIVER_RELOAD_FILE is not set")
        return
    try:
        read = read_settings(Reloadable, {**os.environ, **_lines(Path(path).read_text())})
    except (OSError, UnicodeDecodeError, SettingsError) as error:
        logger.error("nothing reloaded: %s", error)  # noqa: TRY400 - the trace says nothing more
        return
    services.upstream.authorize(read.engine_token)
    logger.info("settings reloaded")


def _lines(text: str) -> dict[str, str]:
    named = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in named if name.strip()}
