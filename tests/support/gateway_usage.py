"""What a tenant has been billed for, as it sees it."""

from __future__ import annotations

import time

import river_client as river

PATIENCE_S = 20.0


def billed(client: river.Client, *, events: int) -> dict[str, int]:
    """Tokens of prompts (cached or not) and completions, once the recorder has written `events` requests down."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        lines = [line for line in client.usage() if line.kind != "storage"]
        sums = {"prompt": 0, "completion": 0}
        for line in lines:
            sums["completion" if line.kind == "completion" else "prompt"] += line.quantity
        seen = sum(line.events for line in lines if line.kind == "completion")
        if seen >= events:
            assert seen == events
            return sums
        assert time.monotonic() < deadline, lines
        time.sleep(0.1)
