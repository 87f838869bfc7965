"""The launcher as a user meets it: up, status, down, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from river_ops.settings import StackInfo
from river_ops.stack_file import read_stack_file

RIVER = (sys.executable, "-m", "river_client.cli")


def river(*arguments: str, data_directory: Path) -> str:
    """The output of a command that succeeds."""
    done = run_river(*arguments, data_directory=data_directory)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_river(*arguments: str, data_directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command with no settings from our own environment."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RIVER_")
    }
    return subprocess.run(
        [*RIVER, *arguments],
        env=environment | {"RIVER_DATA_DIR": str(data_directory)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


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
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    assert keys[0] == keys[1]


def test_a_second_stack_in_one_place_is_refused(stack: StackInfo, stack_directory: Path) -> None:
    """The second one says so in a line, and the first is still found."""
    done = run_river("up", "--port", "0", data_directory=stack_directory)
    assert done.returncode == 1
    assert "a stack runs in" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_stack_file(stack_directory) == stack


def test_an_interrupted_start_leaves_nothing(tmp_path: Path) -> None:
    """A stack that is told to end before it is ready ends at once, with all it had started."""
    environment = {"RIVER_DATA_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [*RIVER, "up", "--port", "0"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "logs").exists():
            assert time.monotonic() < deadline, "no part was started"
            time.sleep(0.05)
        processes = descendants(process.pid)
        assert processes
        process.terminate()
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
        process.wait()
    assert not [one for one in processes if Path(f"/proc/{one}").exists()]
