"""`river test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

REPOSITORY = Path(__file__).parents[3]


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> None:
    """Run the test suite; arguments go to pytest."""
    if not (REPOSITORY / "tests").is_dir():
        raise click.ClickException("the tests are in the repository, not in the installed package")
    command = [sys.executable, "-m", "pytest", *arguments]
    raise SystemExit(subprocess.run(command, cwd=REPOSITORY, check=False).returncode)
