"""The structs of the audit log under `/river/v1/audit`: who changed what."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import field

from river_client.wire import Wire

AuditThrough = Literal["api", "dashboard", "river", "tinker"]
AuditAction = Literal[
    "aliases.delete",
    "aliases.put",
    "aliases.rollback",
    "budgets.set",
    "checkpoints.copy",
    "checkpoints.delete",
    "checkpoints.publish",
    "checkpoints.ttl",
    "checkpoints.unpublish",
    "credit.add",
    "credit.billing",
    "discounts.set",
    "engines.drain",
    "engines.restart",
    "engines.undrain",
    "invoices.close",
    "keys.change",
    "keys.create",
    "keys.limits",
    "keys.revoke",
    "keys.rotate",
    "learning.start",
    "learning.stop",
    "prices.set",
    "tenants.create",
    "tenants.limits",
    "tenants.retention",
    "trainers.drain",
    "trainers.restart",
    "trainers.undrain",
]


class AuditEntry(Wire, frozen=True):
    """One action, done by the key `key_id` of the tenant `key_tenant`, by way of `through`.

    `tenant` is whom it concerns, None is everybody; `subject` the key, tenant, model, alias or path that was changed,
    and `details` what was asked for, never a secret. `request_id` is the answer's `x-request-id`. Keys are named as
    they were then, tenants as they are now; the name of one that is gone is absent.
    """

    entry_id: int
    occurred_at: str
    action: str
    through: str
    key_id: str
    key_name: str
    key_tenant: str
    subject: str
    request_id: str
    key_tenant_name: str | None = None
    tenant: str | None = None
    tenant_name: str | None = None
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class AuditPage(Wire, frozen=True):
    """Newest first; the next page is that `before` the last entry's id."""

    entries: list[AuditEntry]
