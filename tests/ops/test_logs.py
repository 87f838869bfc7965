"""Lines of JSON in the log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from river_client.service import read_settings
from river_ops.logs import JsonFormatter, LogSettings


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


def test_the_level_is_a_setting() -> None:
    """`RIVER_LOG_LEVEL` says what is written, and everybody is told about requests by default."""
    assert read_settings(LogSettings, {}).level == logging.INFO
    assert read_settings(LogSettings, {"RIVER_LOG_LEVEL": "warning"}).level == logging.WARNING


def test_a_wrong_level_is_named() -> None:
    """A part with a wrong level ends with one line that names the variable."""
    done = subprocess.run(
        [sys.executable, "-m", "river_ops.serve", "gateway"],
        env={**os.environ, "RIVER_LOG_LEVEL": "loud"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("river serve gateway: RIVER_LOG_LEVEL='loud'")
    assert done.stderr.count("\n") == 1
