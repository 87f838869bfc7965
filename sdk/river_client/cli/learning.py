"""`river learning`: runs that the server trains on feedback."""

from __future__ import annotations

from typing import get_args

import click

from river_client import wire
from river_client.cli.output import json_option, moment, say, show
from river_client.client import Client
from river_client.learning_wire import Baseline, LearningLoss, LearningState, StartLearning


@click.group()
def learning() -> None:
    """Runs that are trained on the feedback on a model name, continually."""


@learning.command("list")
@json_option
def list_learning(as_json: bool) -> None:
    """Show what your runs learn and have learnt, newest first."""
    with Client() as client:
        found = client.learning.list()
    show(
        found,
        as_json=as_json,
        columns=("RUN", "ALIAS", "STATUS", "STEPS", "COMPLETIONS", "SINCE", "REASON"),
        rows=[
            (
                state.run_id,
                state.alias,
                state.status,
                state.steps,
                state.completions,
                moment(state.started_at),
                state.reason or "",
            )
            for state in found
        ],
        empty="No run learns.",
    )


@learning.command("start")
@click.argument("run_id")
@click.argument("alias")
@click.option("--lr", type=float, required=True, help="Learning rate of AdamW.")
@click.option(
    "--loss",
    type=click.Choice(get_args(LearningLoss)),
    default="importance_sampling",
    show_default=True,
)
@click.option("--min-batch", type=int, default=32, show_default=True, help="Rewarded choices.")
@click.option("--max-batch", type=int, default=256, show_default=True)
@click.option(
    "--baseline",
    type=click.Choice(get_args(Baseline)),
    default="prompt",
    show_default=True,
    help="What a reward is compared with.",
)
@click.option(
    "--publish/--no-publish", default=True, help="Whether the ALIAS follows the run from now on."
)
@json_option
def start_learning(
    run_id: str,
    alias: str,
    lr: float,
    loss: LearningLoss,
    min_batch: int,
    max_batch: int,
    baseline: Baseline,
    publish: bool,
    as_json: bool,
) -> None:
    """Train a RUN on the feedback on an ALIAS until it is stopped."""
    settings = StartLearning(
        alias=alias,
        adam=wire.AdamParams(lr=lr),
        loss_fn=loss,
        min_batch=min_batch,
        max_batch=max_batch,
        baseline=baseline,
        publish="live" if publish else "none",
    )
    with Client() as client:
        state = client.learning.start(run_id, settings)
    _say(state, as_json=as_json)


@learning.command("stop")
@click.argument("run_id")
@json_option
def stop_learning(run_id: str, as_json: bool) -> None:
    """Stop a RUN's learning, once the batch at hand has been applied."""
    with Client() as client:
        state = client.learning.stop(run_id)
    _say(state, as_json=as_json)


@learning.command("show")
@click.argument("run_id")
@json_option
def show_learning(run_id: str, as_json: bool) -> None:
    """Show how far a RUN has come."""
    with Client() as client:
        state = client.learning.get(run_id)
    _say(state, as_json=as_json)


def _say(state: LearningState, *, as_json: bool) -> None:
    reason = f": {state.reason}" if state.reason else ""
    text = (
        f"{state.run_id}, {state.status}, from {state.alias}:"
        f" {state.steps} steps on {state.completions} completions so far{reason}"
    )
    say(state, text, as_json=as_json)


COMMANDS = (learning,)
