"""Logs of the server process, whose parent may be set up by somebody else: JSON lines, or text on a terminal."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

import msgspec

# What every record has; the rest came in by `extra`.
_COMMON_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "taskName",
    "vllm_process_name",
}


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in _COMMON_FIELDS}
        fields |= {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=repr).decode()


def log_to_stderr() -> None:
    """Sends this process's records from `RIVER_LOG_LEVEL` up to stderr; vLLM's own loggers keep their handlers."""
    handler = logging.StreamHandler(sys.stderr)
    if not sys.stderr.isatty():
        handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Whoever started us has checked the name.
    logging.getLogger("river").setLevel(
        os.environ.get("RIVER_LOG_LEVEL", "").upper() or logging.INFO
    )
