"""What gateways tell each other about keys, tenants and their limits, over core NATS: nothing here is ever stored."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

ACCOUNTS_SUBJECT = "gateways.accounts"
QUOTAS_SUBJECT = "gateways.quotas"

LimitKind = Literal["requests", "tokens", "slots"]


class AccountChanged(Struct, frozen=True, kw_only=True):
    """A key, or a tenant with all its keys, is no longer what it was."""

    key_id: str | None = None
    tenant_id: str | None = None


class Part(Struct, frozen=True, array_like=True):
    """One gateway's news of one limit of a key or tenant, `owner`.

    `amount` is what it has drawn since it last told, or for slots how many it has now; among `views` it is what it sees
    in the pool.
    """

    owner: str
    kind: LimitKind
    limit: int
    amount: float
    active: bool


class Announcement(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sent by every gateway when it has news, and every tick to show that it is there.

    `sequence` counts its announcements, so that a lost one is noticed. `asks`: it wants to be told what is left of all
    limits, as it is new or has missed something; `answers` are those for whom the `views` are.
    """

    gateway: str
    sequence: int
    parts: list[Part] = []
    views: list[Part] = []
    answers: list[str] = []
    asks: bool = False
    leaves: bool = False
