"""What serves and what trains (for admins): how it is, and telling it to drain or to start again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from river_client.cli.output import json_option, say, show
from river_client.client import Client, Engines, Trainers

if TYPE_CHECKING:
    from collections.abc import Callable

_SAID = {
    "drain": "takes nothing new and ends what it has begun",
    "undrain": "takes work again",
    "restart": "ends what it has begun and starts again",
}


@click.group()
def engines() -> None:
    """Engines that are alive (for admins)."""


@click.group()
def trainers() -> None:
    """Trainers that are alive (for admins)."""


@engines.command("list")
@json_option
def list_engines(as_json: bool) -> None:
    """Show every engine: its load, its cache, its adapters."""
    with Client() as client:
        found = client.engines.list()
    show(
        found,
        as_json=as_json,
        columns=(
            "ENGINE",
            "BASE",
            "STATE",
            "BATCH",
            "WAITING",
            "CACHE",
            "HITS",
            "TOKENS/S",
            "ADAPTERS",
            "LOAD MS",
        ),
        rows=[
            (
                engine.engine_id,
                engine.base_model,
                engine.state,
                f"{engine.batch}/{engine.batch_max}",
                engine.waiting,
                _percent(engine.kv_cache_used),
                _percent(engine.prefix_hit_rate),
                f"{engine.tokens_per_s:.0f}",
                engine.adapters_held,
                "-" if engine.load_median_ms is None else f"{engine.load_median_ms:.0f}",
            )
            for engine in found
        ],
        empty="No engine is alive.",
    )


@trainers.command("list")
@json_option
def list_trainers(as_json: bool) -> None:
    """Show every trainer: its runs, its queue, where its time goes."""
    with Client() as client:
        found = client.trainers.list()
    show(
        found,
        as_json=as_json,
        columns=(
            "TRAINER",
            "BASE",
            "STATE",
            "RUNS",
            "WAITING",
            "STEPS/S",
            "TOKENS/S",
            "TIME GOES INTO",
            "UNSAVED",
        ),
        rows=[
            (
                trainer.trainer_id,
                trainer.base_model,
                trainer.state,
                trainer.runs,
                trainer.waiting,
                f"{trainer.steps_per_s:.2f}",
                f"{trainer.tokens_per_s:.0f}",
                _phases(trainer.phase_s),
                trainer.unsaved_runs,
            )
            for trainer in found
        ],
        empty="No trainer is alive.",
    )


def _tell(machines: Engines | Trainers, action: str, machine_id: str, *, as_json: bool) -> None:
    told = {"drain": machines.drain, "undrain": machines.undrain, "restart": machines.restart}[
        action
    ](machine_id)
    say(told, f"{machine_id} {_SAID[action]}.", as_json=as_json)


def _add(group: click.Group, action: str, machines: Callable[[Client], Engines | Trainers]) -> None:
    """The command of an action."""

    @group.command(action, help=f"Tell one: it {_SAID[action]}.")
    @click.argument("machine_id", metavar="ID")
    @json_option
    def command(machine_id: str, as_json: bool) -> None:
        with Client() as client:
            _tell(machines(client), action, machine_id, as_json=as_json)

    assert command.name == action


for _action in _SAID:
    _add(engines, _action, lambda client: client.engines)
    _add(trainers, _action, lambda client: client.trainers)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _phases(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    if not total:
        return "-"
    return ", ".join(f"{name} {100 * spent / total:.0f} %" for name, spent in seconds.items())


COMMANDS = (engines, trainers)
