"""`river bench`."""

from __future__ import annotations

import importlib

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
)


@click.command()
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.option("--quick", is_flag=True, help="Under a minute, with numbers that say less.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def bench(name: str, quick: bool, as_json: bool) -> None:
    """Measure this against a peer on the same work; the last line is one JSON object."""
    # What a benchmark loads would slow down every other command.
    from river_ops.bench.programs import ProgramError  # noqa: PLC0415
    from river_ops.stack import StackError  # noqa: PLC0415

    module = importlib.import_module(f"river_ops.bench.{name}")
    try:
        report = module.run(quick=quick, say=lambda text: click.echo(text, err=True))
    except (ProgramError, StackError, ChildError) as error:
        raise click.ClickException(str(error)) from error
    if not as_json:
        for line in module.table(report):
            click.echo(line)
    click.echo(msgspec.json.encode(report).decode())
    errors: list[str] = getattr(report, "errors", [])
    if errors:
        raise click.ClickException("; ".join(errors))
