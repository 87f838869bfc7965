"""`river bench`."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import msgspec

from river_ops.children import ChildError

BENCHMARKS = (
    "training",
    "hotload",
    "gateway",
    "routing",
    "billing",
    "consistency",
    "kernels",
    "layers",
    "dashboard",
)


@click.command()
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.option("--quick", is_flag=True, help="Under a minute, with numbers that say less.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
@click.option(
    "--screenshots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Of `dashboard`: a folder for pictures of every page.",
)
def bench(name: str, quick: bool, as_json: bool, screenshots: Path | None) -> None:
    """Measure this, against a peer on the same work where there is one; the last line is one JSON object."""
    # What a benchmark loads would slow down every other command.
    from river_ops.bench.programs import ProgramError  # noqa: PLC0415
    from river_ops.stack import StackError  # noqa: PLC0415

    if screenshots is not None and name != "dashboard":
        raise click.BadParameter("only `dashboard` has pages", param_hint="--screenshots")
    module = importlib.import_module(f"river_ops.bench.{name}")
    more = {} if screenshots is None else {"screenshots": screenshots}
    try:
        report = module.run(quick=quick, say=lambda text: click.echo(text, err=True), **more)
    except (ProgramError, StackError, ChildError) as error:
        raise click.ClickException(str(error)) from error
    if not as_json:
        for line in module.table(report):
            click.echo(line)
    click.echo(msgspec.json.encode(report).decode())
    errors: list[str] = getattr(report, "errors", [])
    if errors:
        raise click.ClickException("; ".join(errors))
