"""The latest warnings of a process, kept for whoever looks at it from outside. Imports nothing heavy.

Messages of logs hold no keys, prompts or completions, so neither do these.
"""

from __future__ import annotations

import logging
from collections import deque

import msgspec

from river_engine.protocol import PROBLEM_CHARACTERS_MAX, PROBLEMS_TOLD_MAX, Problem

# Of what a record carries besides its message: what it is about, and why.
_SUBJECTS = ("adapter", "run", "operation")
_REASON = "reason"


class RecentProblems(logging.Handler):
    """Keeps the last few warnings and errors; the same one again and again counts as one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[Problem] = deque(maxlen=PROBLEMS_TOLD_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`, from any thread."""
        self.note(_text(record), record.created)

    def note(self, message: str, at: float) -> None:
        """One more."""
        message = message[:PROBLEM_CHARACTERS_MAX]
        last = self._kept[-1] if self._kept else None
        if last is not None and last.message == message:
            self._kept[-1] = msgspec.structs.replace(last, at=at, count=last.count + 1)
        else:
            self._kept.append(Problem(at=at, message=message))

    def told(self) -> list[Problem]:
        """Oldest first."""
        return list(self._kept)


def listening(logger_name: str) -> RecentProblems:
    """What the logger of that name warns of from now on."""
    problems = RecentProblems()
    logging.getLogger(logger_name).addHandler(problems)
    return problems


def _text(record: logging.LogRecord) -> str:
    fields = vars(record)
    about = [str(fields[name]) for name in _SUBJECTS if name in fields]
    text = record.getMessage() + (f" ({', '.join(about)})" if about else "")
    error = record.exc_info[1] if record.exc_info else None
    reason = fields.get(_REASON) or (f"{type(error).__name__}: {error}" if error else None)
    return f"{text}: {reason}" if reason else text
