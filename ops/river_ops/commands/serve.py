"""`river serve`."""

from __future__ import annotations

import click

from river_ops.serve import ENTRY_POINTS
from river_ops.serve import serve as serve_part


@click.command()
@click.argument("part", type=click.Choice(sorted(ENTRY_POINTS)))
def serve(part: str) -> None:
    """Run one part in the foreground; its settings are RIVER_* variables."""
    serve_part(part)
