"""Who may do what, and what it costs: login, tenants, keys, prices, usage."""

from __future__ import annotations

from datetime import datetime

import click

from river_client.cli.output import dollars, json_option, moment, say, show
from river_client.client import Client
from river_client.settings import DEFAULT_BASE_URL, Login, save_login

TIME = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"])


@click.command()
@click.option("--base-url", default=DEFAULT_BASE_URL, show_default=True, prompt="Server")
@click.option("--api-key", prompt="API key", hide_input=True, help="Asked for when left out.")
def login(base_url: str, api_key: str) -> None:
    """Store a server and a key for it, for this user alone."""
    with Client(api_key=api_key, base_url=base_url) as client:
        client.models()  # A wrong key or address is told now, not later.
        path = save_login(Login(api_key=client.api_key, base_url=client.base_url))
    click.echo(f"Stored in {path}.")


@click.command()
@click.option("--since", type=TIME, help="From this hour on (local time).")
@click.option("--until", type=TIME, help="Up to this hour.")
@click.option("--tenant", help="A tenant's id (for admins).")
@click.option("--all", "all_tenants", is_flag=True, help="All tenants (for admins).")
@json_option
def usage(
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
    all_tenants: bool,
    as_json: bool,
) -> None:
    """Show tokens and dollars per tenant, model and kind."""
    with Client() as client:
        lines = client.usage(since, until, tenant="*" if all_tenants else tenant)
    total = dollars(sum(line.amount_nano_usd for line in lines))
    show(
        lines,
        as_json=as_json,
        columns=("TENANT", "MODEL", "KIND", "QUANTITY", "USD"),
        rows=[
            *(
                (
                    line.tenant,
                    line.model,
                    line.kind,
                    f"{line.quantity:,}",
                    dollars(line.amount_nano_usd),
                )
                for line in lines
            ),
            *([("total", "", "", "", total)] if lines else []),
        ],
        empty="Nothing was used.",
    )


@click.command()
@json_option
def prices(as_json: bool) -> None:
    """Show prices: dollars per million tokens, storage per GB and month."""
    with Client() as client:
        found = client.prices()
    show(
        found,
        as_json=as_json,
        columns=("MODEL", "CONTEXT", "KIND", "USD", "FROM", "TO"),
        rows=[
            (
                price.model,
                price.context_length,
                price.kind,
                price.usd_per_million,
                moment(price.valid_from),
                moment(price.valid_to),
            )
            for price in found
        ],
    )


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
        columns=("TENANT", "NAME", "CREATED"),
        rows=[(tenant.tenant_id, tenant.name, moment(tenant.created_at)) for tenant in found],
    )


@tenants.command("create")
@click.argument("name")
@json_option
def create_tenant(name: str, as_json: bool) -> None:
    """Add a tenant."""
    with Client() as client:
        tenant = client.admin.create_tenant(name)
    say(tenant, tenant.tenant_id, as_json=as_json)


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
        columns=("KEY", "TENANT", "NAME", "PREFIX", "SCOPES", "CREATED", "EXPIRES", "REVOKED"),
        rows=[
            (
                key.key_id,
                key.tenant,
                key.name,
                key.prefix,
                ",".join(key.scopes),
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
@json_option
def create_key(
    tenant: str, name: str, scopes: tuple[str, ...], expires: datetime | None, as_json: bool
) -> None:
    """Make a key for a TENANT. Its secret is shown this once."""
    expires_at = expires.astimezone().isoformat() if expires else None
    with Client() as client:
        key = client.admin.create_key(tenant, name=name, scopes=scopes, expires_at=expires_at)
    say(key, key.secret or "", as_json=as_json)


@keys.command("revoke")
@click.argument("key_id")
@json_option
def revoke_key(key_id: str, as_json: bool) -> None:
    """End a key."""
    with Client() as client:
        client.admin.revoke_key(key_id)
    say({"revoked": key_id}, f"{key_id} is revoked.", as_json=as_json)


COMMANDS = (login, usage, prices, tenants, keys)
