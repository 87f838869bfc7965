"""The note that a running stack leaves in its data directory, so that other commands find it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from river_ops.settings import StackInfo

STACK_FILE = "stack.json"


def write_stack_file(data_directory: Path, info: StackInfo) -> None:
    """Leaves the note, readable by its owner alone since it holds a key."""
    path = data_directory / STACK_FILE
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(info)))
    partial.replace(path)


def read_stack_file(data_directory: Path) -> StackInfo | None:
    """The running stack of this directory, or None; a note whose process is gone counts as none."""
    try:
        info = msgspec.json.decode((data_directory / STACK_FILE).read_bytes(), type=StackInfo)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return info if process_exists(info.process_id) else None


def remove_stack_file(data_directory: Path) -> None:
    (data_directory / STACK_FILE).unlink(missing_ok=True)


def process_exists(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
