"""What `ops` adds to the `river` command."""

from __future__ import annotations

import os
from pathlib import Path

import click

from river_ops.stack_file import read_stack_file

DATA_DIRECTORY_VARIABLE = "RIVER_DATA_DIR"
DEFAULT_DATA_DIRECTORY = ".river"


def data_directory() -> Path:
    """Where a local stack keeps its data unless told otherwise."""
    return Path(os.environ.get(DATA_DIRECTORY_VARIABLE, DEFAULT_DATA_DIRECTORY))


def register(group: click.Group) -> None:
    """Entry point `river.commands`: adds our commands, and points all others at a stack that runs here."""
    from river_ops.commands import bench, billing, demo, serve, stack, test  # noqa: PLC0415 (only when asked for)

    commands = (
        stack.up,
        stack.down,
        stack.status,
        serve.serve,
        demo.demo,
        bench.bench,
        test.test,
        billing.billing,
    )
    for command in commands:
        group.add_command(command)
    if "RIVER_BASE_URL" not in os.environ and (info := read_stack_file(data_directory())):
        os.environ["RIVER_BASE_URL"] = info.base_url
        os.environ.setdefault("RIVER_API_KEY", info.admin_key)
