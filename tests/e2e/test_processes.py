"""The launcher as a user meets it: up, status, down, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from river_ops.settings import StackInfo
from river_ops.stack_file import process_exists, read_stack_file

RIVER = (sys.executable, "-m", "river_client.cli")


def river(*arguments: str, data_directory: Path) -> str:
    """Runs the command with no settings from our own environment; returns its output."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RIVER_")
    }
    done = subprocess.run(
        [*RIVER, *arguments],
        env=environment | {"RIVER_DATA_DIR": str(data_directory)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def descendants(process_id: int) -> set[int]:
    """The process ids below a process."""
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found: set[int] = set()
    todo = {process_id}
    while todo:
        todo = set().union(*(children.get(one, set()) for one in todo)) - found
        found |= todo
    return found


def test_up_status_down_leaves_nothing(tmp_path: Path) -> None:
    """A detached stack answers, keeps its key over a restart, and leaves no process behind when it goes down."""
    keys: list[str] = []
    for _ in range(2):
        started = river("up", "--detach", "--port", "0", "--json", data_directory=tmp_path)
        info = msgspec.json.decode(started, type=StackInfo)
        keys.append(info.admin_key)
        assert "river/tiny-moe" in river("status", data_directory=tmp_path)
        processes = descendants(info.process_id)
        assert len(processes) >= 6
        river("down", data_directory=tmp_path)
        assert read_stack_file(tmp_path) is None
        assert not [process for process in processes if process_exists(process)]
    assert keys[0] == keys[1]
