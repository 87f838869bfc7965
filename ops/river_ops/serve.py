"""`river serve PART`: one part in the foreground, its settings from the environment."""

from __future__ import annotations

import importlib
import sys

from river_client.service import SettingsError, read_settings
from river_ops.logs import LogSettings, configure_logging

ENTRY_POINTS = {
    "engine": "river_engine.main",
    "gateway": "river_gateway.main",
    "recorder": "river_billing.recorder",
    "trainer": "river_trainer.main",
}


def serve(part: str) -> None:
    """Runs a part until it is told to stop; a wrong setting ends the process with one line that names it."""
    try:
        configure_logging(read_settings(LogSettings).level)
        # Each part's dependencies load only in its own process.
        module = importlib.import_module(ENTRY_POINTS[part])
        module.main()
    except SettingsError as error:
        sys.exit(f"river serve {part}: {error}")


if __name__ == "__main__":
    serve(sys.argv[1])
