"""Lines of JSON in the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from river_ops.logs import JsonFormatter


def _line(record: logging.LogRecord) -> dict[str, object]:
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_carries_the_ids() -> None:
    """What `extra` brings stands beside the message; nothing of the record's own machinery does."""
    logger = logging.getLogger("river.test")
    extra = {"request": "r1", "status": 200, "took_ms": 1.5, "path": Path("x")}
    record = logger.makeRecord(
        logger.name, logging.WARNING, "f.py", 1, "answered %d\n", (3,), None, extra=extra
    )
    line = _line(record)
    timestamp = line.pop("timestamp")
    assert isinstance(timestamp, str)
    assert timestamp.endswith("Z")
    assert line == {
        "event": "answered 3\n",
        "level": "warning",
        "logger": "river.test",
        "request": "r1",
        "status": 200,
        "took_ms": 1.5,
        "path": "x",
    }


def test_a_line_carries_the_exception() -> None:
    """With its traceback, still on one line."""
    logger = logging.getLogger("river.test")
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    trace = (caught.type, caught.value, caught.tb)
    record = logger.makeRecord(logger.name, logging.ERROR, "f.py", 1, "failed", (), trace)
    exception = _line(record)["exception"]
    assert isinstance(exception, str)
    assert exception.startswith("Traceback")
    assert exception.splitlines()[-1].startswith("ValueError: ")
