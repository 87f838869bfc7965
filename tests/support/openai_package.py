"""The `openai` package's own tests, from its source distribution, in an environment of their own.

Both are made once for each version, in the directory of `RIVER_CONFORMANCE_DIR` (default: `.river/conformance` of the
repository), and found made afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "tests" / "conformance" / "openai_package"
INSTALL_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 240.0
# What pip says of an index that it cannot talk to, as against one that lacks the package.
_AWAY = ("connection broken by", "Could not fetch URL", "Temporary failure in name resolution")


@dataclass(frozen=True)
class Outcomes:
    """Tests as `file::function`, the file relative to the package's API tests, in all forms of its clients."""

    passed: frozenset[str]
    failed: frozenset[str]
    report: str


def cache_directory() -> Path:
    """Where what is made once is kept."""
    return Path(os.environ.get("RIVER_CONFORMANCE_DIR", ROOT / ".river" / "conformance"))


def package_tests(version: str) -> Path:
    """The directory of an unpacked source distribution with an environment beside it.

    Skips the test, and says so, when the package index cannot be reached.
    """
    requirements = OURS / "requirements.txt"
    made = cache_directory() / f"openai-{version}"
    stamp = made / "made"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return made
    shutil.rmtree(made, ignore_errors=True)
    making = cache_directory() / f"openai-{version}.{os.getpid()}"
    making.mkdir(parents=True)
    try:
        # Built with what is installed here, only to be looked into.
        pip(
            sys.executable,
            ["download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"],
            [f"openai=={version}", "--dest", str(making)],
        )
        (archive,) = making.glob("openai-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(making, filter="data")
        (making / f"openai-{version}").rename(making / "source")
        made.parent.mkdir(exist_ok=True)
        making.rename(made)
        venv.create(made / "venv", with_pip=True)
        python = str(made / "venv" / "bin" / "python")
        pip(python, ["install"], [f"openai=={version}", "-r", str(requirements)])
        stamp.write_text(requirements.read_text())
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return made


def run_package_tests(made: Path, files: list[str], *, base_url: str, key: str) -> Outcomes:
    """Runs files of the package's API tests, and ours among them, against a server."""
    source = made / "source"
    ours = source / "tests" / "api_resources" / "test_river_responses.py"
    shutil.copyfile(OURS / "river_responses.py", ours)
    results = made / "results.xml"
    results.unlink(missing_ok=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RIVER_", "PYTEST_", "PYTHON", "OPENAI_"))
    }
    environment |= {
        "TEST_API_BASE_URL": f"{base_url}/v1",
        "RIVER_TEST_KEY": key,
        "PYTHONPATH": str(OURS),
    }
    finished = subprocess.run(
        [
            *(str(made / "venv" / "bin" / "python"), "-m", "pytest"),
            *("-o", "addopts=", "-o", "junit_family=xunit1", "-p", "river_plugin"),
            *("-q", "--tb=line", f"--junitxml={results}"),
            *(f"tests/api_resources/{file}" for file in [*files, ours.name]),
        ],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    report = finished.stdout + finished.stderr
    assert results.exists(), report
    return _outcomes(results, report)


def _outcomes(results: Path, report: str) -> Outcomes:
    passed: set[str] = set()
    failed: set[str] = set()
    for case in ET.parse(results).iter("testcase"):
        file = case.attrib["file"].removeprefix("tests/api_resources/")
        name = f"{file}::{case.attrib['name'].partition('[')[0]}"
        bad = any(child.tag in ("failure", "error", "skipped") for child in case)
        (failed if bad else passed).add(name)
    return Outcomes(frozenset(passed), frozenset(failed), report)


def pip(python: str, command: list[str], arguments: list[str]) -> None:
    """Runs pip; skips the test, loudly, when the package index cannot be reached."""
    finished = subprocess.run(
        [python, "-m", "pip", *command, "--disable-pip-version-check", "--quiet", *arguments],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if finished.returncode == 0:
        return
    said = finished.stdout + finished.stderr
    if any(sign in said for sign in _AWAY):
        pytest.skip(f"THE PACKAGE INDEX CANNOT BE REACHED, so this did not run\n{said}")
    raise AssertionError(said)
