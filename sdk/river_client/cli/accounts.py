"""Who may do what: login, tenants, keys."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, ClassVar, TypeVar

import click
from msgspec import UNSET, UnsetType, structs

from river_client import feedback_wire, wire
from river_client.cli.output import json_option, moment, say, show
from river_client.client import Client
from river_client.settings import DEFAULT_BASE_URL, Login, save_login

Command = TypeVar("Command", bound=Callable[..., Any])

KEY_PREFIX, TINKER_PREFIX = "rv-", "tml-"
TIME = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"])


class LimitType(click.ParamType[int | UnsetType | None]):
    """A positive number, or `none` for no limit."""

    name = "number|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | UnsetType | None:
        """What was typed, as the limit it means; None for none."""
        if value is UNSET:
            return UNSET
        if value == "none":
            return None
        try:
            limit = int(value)
        except ValueError:
            limit = 0
        if limit <= 0:
            self.fail(f"{value!r} is neither a positive number nor `none`", param, ctx)
        return limit


class SpanType(click.ParamType[int]):
    """A length of time such as `12h`, in seconds."""

    name = "time"
    _UNITS: ClassVar = {"s": 1, "m": 60, "h": 3600, "d": 86400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """What was typed, in seconds."""
        if isinstance(value, int):
            return value
        number, unit = value[:-1], value[-1:]
        if not number.isdecimal() or unit not in self._UNITS:
            self.fail(f"{value!r} is no time such as `30d` or `12h`", param, ctx)
        return int(number) * self._UNITS[unit]


class KeptType(click.ParamType[int | UnsetType | None]):
    """A time such as `30d`, `off` for none at all, or `default` for the server's own; in seconds."""

    name = "time|off|default"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | UnsetType | None:
        """What was typed, in seconds; None for the server's own time."""
        if value is UNSET:
            return UNSET
        if value in ("off", "default"):
            return 0 if value == "off" else None
        return SpanType().convert(value, param, ctx)


def limit_options(command: Command) -> Command:
    """The options of what a key or tenant may use; one that is not given is absent from the keywords."""
    for option, text in (
        ("--concurrent-requests", "Requests at once."),
        ("--tokens-per-minute", "Tokens of prompts, answers and training data."),
        ("--requests-per-minute", "Completions, samples and training operations."),
    ):
        command = click.option(option, type=LimitType(), default=UNSET, help=text)(command)
    return command


def tinker_option(command: Command) -> Command:
    """The option that writes a secret as Tinker's SDK wants to see it."""
    text = "Write the secret as `tml-…`, as Tinker's SDK insists; it is the same key either way."
    return click.option("--tinker", is_flag=True, help=text)(command)


def limits_text(limits: wire.Limits | None) -> str:
    """Limits for people: requests and tokens per minute, requests at once."""
    if limits is None:
        return "-"
    parts = [
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrent_requests, "at once"),
    ]
    return ", ".join(f"{value} {unit}" for value, unit in parts if value is not None)


@click.command()
@click.option("--base-url", default=DEFAULT_BASE_URL, show_default=True, prompt="Server")
@click.option("--api-key", prompt="API key", hide_input=True, help="Asked for when left out.")
def login(base_url: str, api_key: str) -> None:
    """Store a server and a key for it, for this user alone."""
    with Client(api_key=api_key, base_url=base_url) as client:
        client.models()  # A wrong key or address is told now, not later.
        path = save_login(Login(api_key=client.api_key, base_url=client.base_url))
    click.echo(f"Stored in {path}.")


@click.group()
def tenants() -> None:
    """Tenants (for admins)."""


@tenants.command("list")
@json_option
def list_tenants(as_json: bool) -> None:
    """Show all tenants."""
    with Client() as client:
        found = client.admin.tenants()
    show(
        found,
        as_json=as_json,
        columns=("TENANT", "NAME", "LIMITS", "CREATED"),
        rows=[
            (
                tenant.tenant_id,
                tenant.name,
                limits_text(tenant.limits),
                moment(tenant.created_at),
            )
            for tenant in found
        ],
    )


@tenants.command("create")
@click.argument("name")
@limit_options
@json_option
def create_tenant(name: str, as_json: bool, **limits: Any) -> None:
    """Add a tenant; limits are over all its keys."""
    with Client() as client:
        tenant = client.admin.create_tenant(name, limits=_new_limits(limits))
    say(tenant, tenant.tenant_id, as_json=as_json)


@tenants.command("limits")
@click.argument("tenant")
@limit_options
@json_option
def tenant_limits(tenant: str, as_json: bool, **limits: Any) -> None:
    """Change limits of a TENANT over all its keys, or show them."""
    with Client() as client:
        changed = client.admin.change_tenant_limits(tenant, wire.ChangeLimits(**limits))
    say(changed, limits_text(changed.limits), as_json=as_json)


@tenants.command("completions")
@click.argument("tenant")
@click.option("--kept", type=KeptType(), default=UNSET, help="For how long from when one is made.")
@json_option
def tenant_completions(tenant: str, kept: Any, as_json: bool) -> None:
    """Change for how long stored completions of a TENANT are kept, or show it."""
    with Client() as client:
        change = feedback_wire.ChangeRetention(completions_kept_s=kept)
        changed = client.admin.change_retention(tenant, change)
    say(changed, _kept_text(changed.completions_kept_s), as_json=as_json)


@click.group()
def keys() -> None:
    """API keys (for admins)."""


@keys.command("list")
@click.option("--tenant", help="Only this tenant's.")
@json_option
def list_keys(tenant: str | None, as_json: bool) -> None:
    """Show keys, without their secrets."""
    with Client() as client:
        found = client.admin.keys(tenant)
    show(
        found,
        as_json=as_json,
        columns=(
            "KEY",
            "TENANT",
            "NAME",
            "PREFIX",
            "SCOPES",
            "LIMITS",
            "CREATED",
            "EXPIRES",
            "REVOKED",
        ),
        rows=[
            (
                key.key_id,
                key.tenant,
                key.name,
                key.prefix,
                ",".join(key.scopes),
                limits_text(key.limits),
                moment(key.created_at),
                moment(key.expires_at),
                moment(key.revoked_at),
            )
            for key in found
        ],
    )


@keys.command("create")
@click.argument("tenant")
@click.option("--name", default="default", show_default=True)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("infer", "train"),
    show_default=True,
    type=click.Choice(["infer", "train", "admin"]),
)
@click.option("--expires", type=TIME, help="When it ends (local time); never if left out.")
@tinker_option
@limit_options
@json_option
def create_key(
    tenant: str,
    name: str,
    scopes: tuple[str, ...],
    expires: datetime | None,
    tinker: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Make a key for a TENANT. Its secret is shown this once."""
    expires_at = expires.astimezone().isoformat() if expires else None
    with Client() as client:
        key = client.admin.create_key(
            tenant, name=name, scopes=scopes, expires_at=expires_at, limits=_new_limits(limits)
        )
    _show_secret(key, tinker=tinker, as_json=as_json)


@keys.command("change")
@click.argument("key_id")
@click.option("--name", help="What it is called.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["infer", "train", "admin"]),
    help="All that it is to have.",
)
@click.option("--expires", type=TIME, help="When it ends (local time).")
@click.option("--never-expires", is_flag=True, help="It does not end by itself.")
@json_option
def change_key(
    key_id: str,
    name: str | None,
    scopes: tuple[str, ...],
    expires: datetime | None,
    never_expires: bool,
    as_json: bool,
) -> None:
    """Change name, scopes or expiry of a key; what is left out stays."""
    if expires is not None and never_expires:
        raise click.UsageError("give --expires or --never-expires")
    at = None if expires is None else expires.astimezone().isoformat()
    change = wire.ChangeKey(
        name=UNSET if name is None else name,
        scopes=[*scopes] if scopes else UNSET,
        expires_at=at if at is not None or never_expires else UNSET,
    )
    with Client() as client:
        key = client.admin.change_key(key_id, change)
    ends = "never ends" if key.expires_at is None else f"ends {moment(key.expires_at)}"
    say(key, f"{key.name}: {', '.join(key.scopes)}, {ends}.", as_json=as_json)


@keys.command("rotate")
@click.argument("key_id")
@click.option(
    "--grace",
    type=SpanType(),
    default="0s",
    show_default=True,
    help="How long the old secret goes on beside the new one, such as `12h`; up to `7d`.",
)
@tinker_option
@json_option
def rotate_key(key_id: str, grace: int, tinker: bool, as_json: bool) -> None:
    """Give a key a new secret, which is shown this once."""
    with Client() as client:
        key = client.admin.rotate_key(key_id, grace_s=grace)
    _show_secret(key, tinker=tinker, as_json=as_json)


@keys.command("limits")
@click.argument("key_id")
@limit_options
@json_option
def key_limits(key_id: str, as_json: bool, **limits: Any) -> None:
    """Change limits of a key, or show them."""
    with Client() as client:
        changed = client.admin.change_key_limits(key_id, wire.ChangeLimits(**limits))
    say(changed, limits_text(changed.limits), as_json=as_json)


@keys.command("revoke")
@click.argument("key_id")
@json_option
def revoke_key(key_id: str, as_json: bool) -> None:
    """End a key."""
    with Client() as client:
        client.admin.revoke_key(key_id)
    say({"revoked": key_id}, f"{key_id} is revoked.", as_json=as_json)


def _show_secret(key: wire.ApiKey, *, tinker: bool, as_json: bool) -> None:
    secret = key.secret
    assert secret is not None
    if tinker:
        secret = TINKER_PREFIX + secret.removeprefix(KEY_PREFIX)
    say(structs.replace(key, secret=secret), secret, as_json=as_json)


def _kept_text(kept_s: int | None) -> str:
    if kept_s is None:
        return "Completions are kept for the server's own time."
    if kept_s == 0:
        return "Completions are not kept."
    return f"Completions are kept for {timedelta(seconds=kept_s)}."


def _new_limits(given: dict[str, Any]) -> wire.Limits | None:
    limits = wire.Limits(**{name: value for name, value in given.items() if value is not UNSET})
    return None if limits == wire.Limits() else limits


COMMANDS = (login, tenants, keys)
