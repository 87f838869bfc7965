"""Logs as lines of JSON, or as coloured text on a terminal.

Every part logs with the standard `logging`; here it is only written out. A gateway writes a line for every request, so
lines of JSON are made by a formatter of our own, at half the cost of structlog's, which writes the text on a terminal.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec
import structlog

QUIET_LOGGERS = ("httpx", "nats", "urllib3")

_PLAIN_ATTRIBUTES = frozenset(logging.LogRecord("", logging.INFO, "", 0, "", (), None).__dict__) | {
    "asctime",
    "message",
    "taskName",
}


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`RIVER_LOG_LEVEL`: from `warning` on, the gateway does not write a line for every request."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def level(self) -> int:
        """As `logging` counts."""
        return logging.getLevelNamesMapping()[self.log_level.upper()]


def configure_logging(level: int = logging.INFO) -> None:
    """Sends every record of this process to stderr, with whatever ids its `extra` carries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_text_formatter() if sys.stderr.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Nobody reads these; finding them out costs more than writing the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class JsonFormatter(logging.Formatter):
    """One JSON object a line: event, level, logger, timestamp, what `extra` carries, and the exception if any."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder = msgspec.json.Encoder(enc_hook=str)

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": datetime.fromtimestamp(record.created, UTC),
        }
        attributes = record.__dict__
        line |= {name: attributes[name] for name in attributes if name not in _PLAIN_ATTRIBUTES}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._encoder.encode(line).decode()


def _text_formatter() -> logging.Formatter:
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.dev.ConsoleRenderer(),
        ],
    )
