"""Clients that others wrote, unmodified, in an environment of their own: `river-client`, `tinker`, `tinker-cookbook`.

It cannot be River's own: the official `river-client` is imported by the same name as our SDK. It is made once for each
lock (`ops/requirements/clients.txt`), inside River's environment, into which it looks for what it lacks: torch,
transformers and numpy are there only once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from support.openai_package import ROOT, pip

LOCK = ROOT / "ops" / "requirements" / "clients.txt"
FOLDER = Path(sys.prefix) / "clients"
CLIENT_TIMEOUT_S = 240.0
# The lock is complete; `river-client` asks for Python 3.12, and its wheel is pure and runs on 3.11.
_INSTALL = ["install", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TINKER_TELEMETRY": "0",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_FOREIGN = ("RIVER_", "TINKER_", "OPENAI_", "PYTHON", "PYTEST_", "HF_", "CLOUDFLARE_")


def client_programs() -> Path:
    """The folder of the environment's programs (`python`, `tinker`), made if this lock's is not there.

    Skips the test, and says so, when the package index cannot be reached.
    """
    wanted = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()
    stamp = FOLDER / "made"
    with _alone():
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(FOLDER, ignore_errors=True)
            venv.create(FOLDER, with_pip=False)
            python = str(FOLDER / "bin" / "python")
            pip(
                sys.executable,
                ["--python", python, *_INSTALL],
                ["--require-hashes", "-r", str(LOCK)],
            )
            # A folder named in such a file is searched last, and what such files there name is not searched at all:
            # our SDK, which is installed by one, stays out of sight.
            site = Path(sysconfig.get_path("purelib", vars={"base": str(FOLDER)}))
            (site / "river_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
            stamp.write_text(wanted)
    return FOLDER / "bin"


def run_client(
    program: Path | str,
    *arguments: str,
    environment: Mapping[str, str],
    timeout_s: float = CLIENT_TIMEOUT_S,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment (`tinker`), or a file of Python by it, offline; returns its output and status.

    It sees nothing of this process' settings of River, Python or a client but what `environment` has.
    """
    programs = client_programs()
    is_file = isinstance(program, Path)
    argv = [str(programs / "python"), str(program)] if is_file else [str(programs / program)]
    return subprocess.run(
        [*argv, *arguments],
        env=client_variables(environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def client_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables with which a client is started."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | _OFFLINE | dict(environment)


@contextmanager
def _alone() -> Iterator[None]:
    """Only one process at a time makes the environment; others wait for it."""
    with (FOLDER.parent / "clients.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
