"""Processes that must not outlive the one that started them. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LIFELINE_VARIABLE = "RIVER_ENGINE_LIFELINE"
"""Set for every process of an engine; vLLM's own child sees it too and ties itself to its parent."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process as soon as its parent is gone (Linux; elsewhere a no-op).

    `parent` is the process id of the expected parent: if that one has died already, this process ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent is not None and os.getppid() != parent:
        sys.exit(1)
