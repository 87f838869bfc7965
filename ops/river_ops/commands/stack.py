"""`river up`, `down` and `status`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import httpx
import msgspec

from river_client.service import SettingsError
from river_ops import limits
from river_ops.children import ChildError
from river_ops.commands import DATA_DIRECTORY_VARIABLE, DEFAULT_DATA_DIRECTORY
from river_ops.settings import DEFAULT_PORT, TINY_BASE, StackInfo, StackOptions, parse_base
from river_ops.stack_file import StackRunsError, read_stack_file

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA_DIRECTORY,
    envvar=DATA_DIRECTORY_VARIABLE,
    show_default=True,
    help="Where the stack keeps its data.",
)


@click.command()
@data_dir_option
@click.option("--port", default=DEFAULT_PORT, envvar="RIVER_PORT", show_default=True)
@click.option(
    "--grpc-port",
    type=int,
    envvar="RIVER_GRPC_PORT",
    help="For the River gRPC client; by default the port after the other.",
)
@click.option("--base", "bases", multiple=True, help="A model directory or id; repeatable.")
@click.option("--engines", default=1, show_default=True, help="Engines per base model.")
@click.option(
    "--trainers",
    default=1,
    show_default=True,
    help="Trainers per base model; one works, others stand by.",
)
@click.option("--detach", is_flag=True, help="Return once the stack is ready.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def up(
    data_dir: Path,
    port: int,
    grpc_port: int | None,
    bases: tuple[str, ...],
    engines: int,
    trainers: int,
    detach: bool,
    as_json: bool,
) -> None:
    """Start the whole platform here; Ctrl-C stops it."""
    if detach:
        print_info(start_detached(data_dir), as_json=as_json)
        return
    from river_ops.stack import StackError, options_from_environment, running_stack  # noqa: PLC0415

    # An event and no exception, which could be raised where Python swallows it, such as in a finalizer.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        options: StackOptions = options_from_environment(
            data_directory=data_dir,
            port=port,
            grpc_port=grpc_port,
            bases=tuple(parse_base(base) for base in bases) or (TINY_BASE,),
            engines=engines,
            trainers=trainers,
        )
        click.echo("Starting…", err=True)
        with running_stack(options, interrupted=stop) as info:
            print_info(info, as_json=as_json)
            stop.wait()
            click.echo("Stopping…", err=True)
    except (StackRunsError, StackError, ChildError, SettingsError) as error:
        raise click.ClickException(str(error)) from error


@click.command()
@data_dir_option
def down(data_dir: Path) -> None:
    """Stop the stack that runs here."""
    info = read_stack_file(data_dir)
    if info is None:
        raise click.ClickException(f"no stack runs in {data_dir}")
    os.kill(info.process_id, signal.SIGTERM)
    deadline = time.monotonic() + limits.CHILD_STOP_TIMEOUT_S * 2
    while read_stack_file(data_dir) is not None:
        if time.monotonic() > deadline:
            raise click.ClickException(f"process {info.process_id} does not end")
        time.sleep(limits.READY_POLL_INTERVAL_S)
    click.echo("Stopped.")


@click.command()
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(data_dir: Path, as_json: bool) -> None:
    """Show whether a stack runs here, and which models it serves."""
    info = read_stack_file(data_dir)
    if info is None:
        raise click.ClickException(f"no stack runs in {data_dir}")
    headers = {"authorization": f"Bearer {info.admin_key}"}
    answer = httpx.get(f"{info.base_url}/river/v1/models", headers=headers, timeout=10.0)
    models = answer.raise_for_status().json().get("models", [])
    if as_json:
        click.echo(msgspec.json.encode({"base_url": info.base_url, "models": models}).decode())
        return
    print_info(info, as_json=False)
    for model in models:
        abilities = [name for name in ("trainable", "servable") if model[name]]
        click.echo(f"  {model['name']}: {', '.join(abilities) or 'not available'}")


def start_detached(data_dir: Path) -> StackInfo:
    """Starts `river up` with our own arguments in a session of its own and waits until it is ready."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "--json")]
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_path = data_dir / "up.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "river_client.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # The key is printed there, and logs hold no keys.
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + limits.STACK_START_TIMEOUT_S
    while (info := read_stack_file(data_dir)) is None or info.process_id != process.pid:
        if process.poll() is not None:
            raise click.ClickException(log_path.read_text(errors="replace").strip())
        if time.monotonic() > deadline:
            process.terminate()
            raise click.ClickException(f"not ready; see {log_path}")
        time.sleep(limits.READY_POLL_INTERVAL_S)
    return info


def print_info(info: StackInfo, *, as_json: bool) -> None:
    """Says where the stack is and how to use it."""
    if as_json:
        click.echo(msgspec.json.encode(info).decode())
        return
    click.echo(f"Base URL    {info.base_url}")
    click.echo(f"Dashboard   {info.base_url}/admin")
    click.echo(f"River gRPC  127.0.0.1:{info.grpc_port}")
    click.echo(f"Admin key   {info.admin_key}")
    click.echo(f"Models      {', '.join(info.bases)}")
