"""`river demo`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from tqdm import tqdm

from river_client.service import SettingsError
from river_client.wire import NANO_USD_PER_USD
from river_ops.children import ChildError
from river_ops.commands.stack import data_dir_option
from river_ops.stack_file import StackRunsError, read_stack_file

if TYPE_CHECKING:
    from river_ops.demo.loop import Progress
    from river_ops.demo.run import Demo

PLOT_WIDTH, PLOT_HEIGHT = 72, 16


@click.command()
@data_dir_option
@click.option("--steps", default=28, show_default=True, help="Training steps.")
@click.option("--json", "as_json", is_flag=True, help="Last line one JSON object.")
def demo(data_dir: Path, steps: int, as_json: bool) -> None:
    """Train the tiny model with GRPO through the whole platform, chat with it, print the bill."""
    # What only this command needs would slow down every other one.
    from river_ops.demo.run import run_demo  # noqa: PLC0415
    from river_ops.stack import (  # noqa: PLC0415
        StackError,
        options_from_environment,
        running_stack,
    )

    with ExitStack() as stack:
        info = read_stack_file(data_dir)
        if info is None:
            click.echo("Starting the platform…", err=True)
            try:
                options = options_from_environment(data_directory=data_dir, port=0)
                info = stack.enter_context(running_stack(options))
            except (StackRunsError, StackError, ChildError, SettingsError) as error:
                raise click.ClickException(str(error)) from error
        bar = stack.enter_context(tqdm(total=steps, unit="step", disable=not sys.stderr.isatty()))

        def show(progress: Progress) -> None:
            bar.update(progress.step - bar.n)
            if progress.held_out_reward is not None:
                bar.set_postfix(reward=f"{progress.held_out_reward:.3f}")
                if not sys.stderr.isatty():
                    line = (
                        f"step {progress.step:3d}  held-out reward {progress.held_out_reward:.3f}"
                    )
                    click.echo(line, err=True)

        result = run_demo(info, steps=steps, show=show)
        bar.close()
        print_demo(result)
    if as_json:
        click.echo(msgspec.json.encode(result.result).decode())
    if result.billed != result.counted:
        raise click.ClickException("the bill and the counters differ")


def print_demo(demo: Demo) -> None:
    """The curve, the chat and the bill, for a person."""
    assert demo.result is not None
    click.echo(curve_text(demo.curve))
    click.echo(f"\nCheckpoint  {demo.result.checkpoint}")
    click.echo(f"Question    {demo.question}")
    click.echo(f"Answer      {demo.answer}")
    click.echo(f"\n{'Bill':<16}{'tokens':>12}{'counted':>12}{'dollars':>14}")
    for line in sorted(demo.bill, key=lambda line: line.kind):
        dollars = line.amount_nano_usd / NANO_USD_PER_USD
        counted = demo.counted[line.kind]
        click.echo(f"{line.kind:<16}{line.quantity:>12,}{counted:>12,}{dollars:>14.6f}")
    click.echo(f"{'total':<16}{'':>24}{demo.result.cost_usd:>14.6f}")
    click.echo(
        f"\nReward on held-out problems {demo.result.reward_first:.2f} → "
        f"{demo.result.reward_last:.2f} in {demo.result.steps} steps, {demo.result.seconds:.0f} s."
    )


def curve_text(curve: list[tuple[int, float]]) -> str:
    """The reward curve drawn with characters."""
    import plotext  # noqa: PLC0415 (only the demo draws)

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(PLOT_WIDTH, PLOT_HEIGHT)
    plotext.ylim(0, 1)
    plotext.title("reward on held-out problems")
    plotext.xlabel("step")
    steps, rewards = zip(*curve, strict=True)
    plotext.plot(list(steps), list(rewards), marker="braille")
    return plotext.uncolorize(plotext.build())
