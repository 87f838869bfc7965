"""The launcher's small pieces: children, the stack's note, base names, settings, counters, the curve."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from river_ops.children import Child, ChildError
from river_ops.commands.demo import curve_text
from river_ops.demo.counters import counted_tokens
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import Base, StackInfo, parse_base
from river_ops.stack_file import StackRunsError, claimed, read_stack_file, write_stack_file

INFO = StackInfo(
    postgres_url="postgresql://127.0.0.1/river",
    process_id=os.getpid(),
    base_url="http://127.0.0.1:1",
    grpc_port=2,
    admin_key="rv-secret",
    bases=[TINY_MOE_NAME],
    engine_metrics_urls=[],
    trainer_metrics_urls=[],
)


def test_a_child_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    """What a program said before it ended is in the error."""
    program = "import sys; sys.exit('no such colour')"
    child = Child(name="painter", argv=[sys.executable, "-c", program], log_path=tmp_path / "log")
    child.start()
    with pytest.raises(ChildError, match=r"painter ended with code 1\n.*no such colour"):
        child.wait_until(lambda: False, timeout_s=30)


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    """A program deaf to its signal is gone after the time-out all the same."""
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "time.sleep(60)"
    )
    child = Child(name="deaf", argv=[sys.executable, "-c", program], log_path=tmp_path / "log")
    child.start()
    child.wait_until(lambda: "deaf" in child.log_tail(), timeout_s=30)
    child.stop(timeout_s=0.2)
    assert not child.running


def test_the_stack_note_is_private_and_ends_with_its_process(tmp_path: Path) -> None:
    """Only its owner reads the note, one process has it at a time, and a note left by a crash counts for nothing."""
    with claimed(tmp_path):
        assert read_stack_file(tmp_path) is None
        write_stack_file(tmp_path, INFO)
        assert read_stack_file(tmp_path) == INFO
        mode = (tmp_path / "stack.json").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        with pytest.raises(StackRunsError), claimed(tmp_path):
            pass
        assert read_stack_file(tmp_path) == INFO
    assert not (tmp_path / "stack.json").exists()
    write_stack_file(tmp_path, INFO)
    assert read_stack_file(tmp_path) is None


def test_a_base_is_called_by_its_directory_or_its_id(tmp_path: Path) -> None:
    """A directory gives its own name, a hub id is its name, and the tiny model keeps the one it is priced by."""
    (tmp_path / "my-model").mkdir()
    assert parse_base(str(tmp_path / "my-model")).name == "my-model"
    assert parse_base("Someone/Some-Model") == Base("Someone/Some-Model", "Someone/Some-Model")
    assert parse_base(str(TINY_MOE)).name == TINY_MOE_NAME


@pytest.mark.parametrize("part", ["engine", "gateway", "recorder", "trainer"])
def test_a_part_without_its_settings_says_which(part: str) -> None:
    """A missing variable ends a part with one line that names it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RIVER_")
    }
    done = subprocess.run(
        [sys.executable, "-m", "river_ops.serve", part],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].count("RIVER_") == 1
    assert "Traceback" not in done.stderr


def test_counters_add_up_over_engines_and_trainers() -> None:
    """Every engine's and trainer's tokens are in the sum, other metrics are not."""
    text = (
        b"# TYPE river_engine_tokens counter\n"
        b'river_engine_tokens_total{kind="prompt"} 5.0\n'
        b'river_engine_tokens_total{kind="completion"} 7.0\n'
        b"# TYPE river_trainer_tokens counter\n"
        b"river_trainer_tokens_total 11.0\n"
    )

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        counted = counted_tokens([url, url], [url])
        server.shutdown()
    assert counted == {"prompt": 10, "completion": 14, "training": 11}


def test_the_curve_is_plain_text() -> None:
    """The drawing carries its title and no terminal codes, so that it can be piped."""
    text = curve_text([(0, 0.3), (4, 0.9)])
    assert "reward on held-out problems" in text
    assert "\x1b" not in text
