"""The house keeps its own rules: formatting, lint, types, and files that one can read in a sitting."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LINES_MAX = 500


@pytest.mark.slow
def test_the_check_passes() -> None:
    """`ops/check` finds nothing."""
    done = subprocess.run(
        [REPOSITORY / "ops" / "check"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_outgrows_a_sitting() -> None:
    """A file that has become too long has a seam somewhere."""
    lengths = {
        path.relative_to(REPOSITORY): len(path.read_text().splitlines())
        for part in ("gateway", "engine", "trainer", "kernels", "billing", "sdk", "ops", "tests")
        for path in (REPOSITORY / part).rglob("*.py")
    }
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > LINES_MAX} == {}
