"""Debian's Chromium, for the tests and pictures of the dashboard."""

from __future__ import annotations

import os
import shutil
import subprocess

INSTALL_TIMEOUT_S = 300.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
"""Root, as in a container, has no sandbox; there may be no GPU and little shared memory."""


class ChromiumMissingError(Exception):
    """There is none, and none can be installed."""


def find_chromium() -> str | None:
    """The path of a Chromium: what `RIVER_CHROMIUM` names, else one on the PATH."""
    named = os.environ.get("RIVER_CHROMIUM")
    if named:
        return named
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def ensure_chromium() -> str:
    """The path of a Chromium, installed from Debian's packages if there is none.

    Raises:
        ChromiumMissingError: it says what to do.
    """
    found = find_chromium()
    if found is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ChromiumMissingError("install the package chromium, or name one in RIVER_CHROMIUM")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for arguments in (["update", "-q"], ["install", "-yq", "chromium"]):
            subprocess.run(
                ["apt-get", *arguments],  # noqa: S607 - root's own PATH
                check=True,
                capture_output=True,
                env=environment,
                timeout=INSTALL_TIMEOUT_S,
            )
    except (subprocess.SubprocessError, OSError) as error:
        raise ChromiumMissingError(f"the package chromium cannot be installed: {error}") from error
    found = find_chromium()
    if found is None:
        raise ChromiumMissingError("the package chromium has brought no program")
    return found
