"""Many samples at once through the Tinker dialect of the whole stack."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import numpy as np
from support.tinker_programs import run_tinker

from river_ops.settings import StackInfo

HEALTHZ_P99_MAX_MS = 100.0


def test_many_samples_at_once_leave_the_gateway_answering(stack: StackInfo, tmp_path: Path) -> None:
    """512 samples of the unmodified SDK at once: none fails, and `/healthz` stays under 100 ms."""
    over, waits = threading.Event(), list[tuple[float, float]]()  # When, and how many milliseconds.

    def watch() -> None:
        with httpx.Client(base_url=stack.base_url, timeout=30) as http:
            while not over.is_set():
                began = time.time()
                assert http.get("/healthz").status_code == 200
                waits.append((began, (time.time() - began) * 1000))
                time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        found = run_tinker(stack, "tinker_many.py", tmp_path)
    finally:
        over.set()
        watching.join()
    assert (found["drawn"], found["failed"]) == (512, [])
    began_at, ended_at = found["times"]
    waits_ms = [wait_ms for at, wait_ms in waits if began_at <= at <= ended_at]
    assert len(waits_ms) > 20
    assert np.percentile(waits_ms, 99) < HEALTHZ_P99_MAX_MS, sorted(waits_ms)[-20:]
