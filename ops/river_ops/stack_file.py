"""How a running stack is found: a note in its data directory, and a lock that lasts exactly as long as its process.

The lock, and not the process id in the note, says whether the stack runs: ids are used again after a crash or a reboot,
a lock is gone with the process that held it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from river_ops.private_files import write_private
from river_ops.settings import StackInfo

STACK_FILE = "stack.json"
LOCK_FILE = "stack.lock"


class StackRunsError(RuntimeError):
    """Another process has a stack in this directory."""


@contextmanager
def claimed(data_directory: Path) -> Iterator[None]:
    """Makes this process the one whose stack the directory is; the note goes when the block ends.

    Raises:
        StackRunsError: another process is.
    """
    data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data_directory / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackRunsError(f"a stack runs in {data_directory} already") from None
        try:
            yield
        finally:
            (data_directory / STACK_FILE).unlink(missing_ok=True)


def write_stack_file(data_directory: Path, info: StackInfo) -> None:
    """Leaves the note."""
    path = data_directory / STACK_FILE
    partial = path.with_suffix(".partial")
    write_private(partial, msgspec.json.format(msgspec.json.encode(info)))
    partial.replace(path)


def read_stack_file(data_directory: Path) -> StackInfo | None:
    """The ready stack of this directory, or None."""
    if not _is_claimed(data_directory):
        return None
    try:
        return msgspec.json.decode((data_directory / STACK_FILE).read_bytes(), type=StackInfo)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _is_claimed(data_directory: Path) -> bool:
    try:
        with (data_directory / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
