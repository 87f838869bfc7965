"""What a user does: runs, checkpoints, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from river_client.cli.accounts import SpanType
from river_client.cli.output import bytes_text, json_option, moment, say, show
from river_client.client import Client


@click.group()
def runs() -> None:
    """Adapters in training."""


@runs.command("list")
@json_option
def list_runs(as_json: bool) -> None:
    """Show your runs, newest first."""
    with Client() as client:
        found = client.runs.list()
    show(
        found,
        as_json=as_json,
        columns=("RUN", "BASE MODEL", "RANK", "STEP", "CREATED"),
        rows=[
            (
                run.run_id,
                run.base_model,
                run.lora.rank,
                "lost" if run.lost else run.step,
                moment(run.created_at),
            )
            for run in found
        ],
    )


@runs.command("show")
@click.argument("run_id")
@json_option
def show_run(run_id: str, as_json: bool) -> None:
    """Show one run and its newest metrics."""
    with Client() as client:
        run = client.runs.get(run_id)
    facts = [
        ("run", run.run_id),
        ("base model", run.base_model),
        ("rank", str(run.lora.rank)),
        ("step", str(run.step)),
        ("created", moment(run.created_at)),
        *([] if run.lost is None else [("lost", run.lost)]),
        *run.tags.items(),
        *((name, f"{value:.6g}") for name, value in sorted(run.metrics.items())),
    ]
    width = max(len(name) for name, _ in facts)
    say(run, "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts), as_json=as_json)


class TtlType(click.ParamType[int | None]):
    """A time such as `30d`, or `forever`; in seconds."""

    name = "time|forever"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """What was typed, in seconds; None for ever."""
        return None if value == "forever" else SpanType().convert(value, param, ctx)


@click.group()
def checkpoints() -> None:
    """Stored weights."""


@checkpoints.command("list")
@json_option
def list_checkpoints(as_json: bool) -> None:
    """Show your checkpoints, newest first."""
    with Client() as client:
        found = client.checkpoints.list()
    show(
        found,
        as_json=as_json,
        columns=("PATH", "BASE MODEL", "VERSION", "SIZE", "CREATED", "EXPIRES"),
        rows=[
            (
                checkpoint.path,
                checkpoint.base_model,
                checkpoint.policy_version,
                bytes_text(checkpoint.size_bytes),
                moment(checkpoint.created_at),
                moment(checkpoint.expires_at),
            )
            for checkpoint in found
        ],
    )


@checkpoints.command()
@click.argument("path")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@json_option
def download(path: str, directory: Path, as_json: bool) -> None:
    """Copy all files of a checkpoint into a directory; an interrupted download is resumed."""
    with Client() as client:
        client.checkpoints.download(path, directory)
    say({"directory": str(directory)}, f"{path} is in {directory}.", as_json=as_json)


@checkpoints.command()
@click.argument("path")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@json_option
def export(path: str, directory: Path, as_json: bool) -> None:
    """Make a directory that PEFT and vLLM load, without optimizer."""
    with Client() as client:
        client.checkpoints.export(path, directory)
    say({"directory": str(directory)}, f"{path} is in {directory}.", as_json=as_json)


@checkpoints.command("import")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", required=True, help="The model it was made for, by its name here.")
@click.option("--name", default="imported", show_default=True, help="What to call the checkpoint.")
@click.option("--ttl", type=click.IntRange(min=1), help="Seconds until it expires.")
@json_option
def import_adapter(
    directory: Path, base_model: str, name: str, ttl: int | None, as_json: bool
) -> None:
    """Make a checkpoint of a LoRA adapter that PEFT saved in DIRECTORY."""
    with Client() as client:
        made = client.checkpoints.import_adapter(
            directory, base_model=base_model, name=name, ttl=ttl
        )
    say(made, made.path, as_json=as_json)


@checkpoints.command()
@click.argument("path")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(path: str, yes: bool, as_json: bool) -> None:
    """Delete a checkpoint and its files."""
    if not yes:
        click.confirm(f"Delete {path} for good?", abort=True, err=True)
    with Client() as client:
        client.checkpoints.delete(path)
    say({"deleted": path}, f"{path} is deleted.", as_json=as_json)


@checkpoints.command()
@click.argument("path")
@click.argument("kept", metavar="TIME", type=TtlType())
@json_option
def ttl(path: str, kept: int | None, as_json: bool) -> None:
    """Keep a checkpoint for a TIME from now on, such as `30d`, or `forever`."""
    with Client() as client:
        changed = client.checkpoints.set_ttl(path, kept)
    until = f"until {moment(changed.expires_at)}" if changed.expires_at else "for ever"
    say(changed, f"{path} is kept {until}.", as_json=as_json)


@checkpoints.command()
@click.argument("path")
@click.argument("name")
@json_option
def promote(path: str, name: str, as_json: bool) -> None:
    """Serve a checkpoint under a NAME; promote an older one to roll back."""
    with Client() as client:
        alias = client.checkpoints.promote(path, name)
    say(alias, f"{alias.name} is now {alias.target}.", as_json=as_json)


@click.command()
@click.argument("message", required=False)
@click.option(
    "--model", "-m", required=True, help="A base model, checkpoint path, run path or alias."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=None)
@json_option
def chat(
    message: str | None, model: str, max_tokens: int, temperature: float | None, as_json: bool
) -> None:
    """Ask a model: one MESSAGE, or a conversation until end of input."""
    with Client() as client:
        if message is not None and as_json:
            reply = client.chat(
                message, model=model, max_tokens=max_tokens, temperature=temperature
            )
            say(reply, reply.text, as_json=True)
            return
        history: list[dict[str, str]] = []
        while (text := message if message is not None else _next_line()) is not None:
            history.append({"role": "user", "content": text})
            pieces: list[str] = []
            for piece in client.chat_stream(
                history, model=model, max_tokens=max_tokens, temperature=temperature
            ):
                pieces.append(piece)
                click.echo(piece, nl=False)
            click.echo()
            if message is not None:
                return
            history.append({"role": "assistant", "content": "".join(pieces)})


def _next_line() -> str | None:
    try:
        return click.prompt("you", prompt_suffix="> ", err=True)
    except click.Abort:
        return None


COMMANDS = (runs, checkpoints, chat)
