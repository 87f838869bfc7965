"""The audit log: who changed what."""

from __future__ import annotations

import click
import msgspec

from river_client.audit_wire import AuditEntry
from river_client.cli.output import json_option, moment, show
from river_client.client import Client


@click.command()
@click.option("--day", help="Only of this UTC day, such as 2026-10-31.")
@click.option("--action", help="Only `keys.create`, say, or all of `keys`.")
@click.option("--tenant", help="Only what concerns this tenant, by id or name (for admins).")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--before", type=int, help="Only before the entry of this number.")
@json_option
def audit(
    day: str | None,
    action: str | None,
    tenant: str | None,
    limit: int,
    before: int | None,
    as_json: bool,
) -> None:
    """Show who changed what, newest first."""
    with Client() as client:
        found = client.audit.list(day=day, action=action, tenant=tenant, before=before, limit=limit)
    show(
        found,
        as_json=as_json,
        columns=("ENTRY", "TIME", "BY", "OF", "THROUGH", "ACTION", "TENANT", "WHAT", "DETAILS"),
        rows=[_row(entry) for entry in found],
    )


def _row(entry: AuditEntry) -> tuple[object, ...]:
    return (
        entry.entry_id,
        moment(entry.occurred_at),
        f"{entry.key_name} {entry.key_id}",
        entry.key_tenant_name or entry.key_tenant,
        entry.through,
        entry.action,
        entry.tenant_name or entry.tenant or "all",
        entry.subject,
        msgspec.json.encode(entry.details).decode(),
    )


COMMANDS = (audit,)
