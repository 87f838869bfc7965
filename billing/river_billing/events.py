"""What others tell the recorder. Imports nothing heavy.

JetStream: `EVENTS_STREAM`, subjects `usage.<tenant>` (`UsageEvent`) and `catalog.<run>`
(`RunAdvanced`, `CheckpointSaved`, `TokensCounted`), kept until the recorder has committed them to Postgres. A message
holds one event, or a list of usage events, then under `usage.group`. The message id is the identity
of what it holds, and the primary keys in Postgres make recording an event twice a no-op.
"""

from __future__ import annotations

import uuid
from enum import StrEnum

from msgspec import Struct, field

EVENTS_STREAM = "EVENTS"
RECORDER_CONSUMER = "recorder"
USAGE_GROUP_SUBJECT = "usage.group"


class UsageKind(StrEnum):
    """What is counted; the unit is tokens, except for storage."""

    PROMPT = "prompt"
    CACHED_PROMPT = "cached_prompt"
    COMPLETION = "completion"
    TRAINING = "training"
    STORAGE = "storage"


class Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Something that happened and has to be written down."""


class UsageEvent(Event, frozen=True, tag="usage"):
    """One request or operation, with the counts of every kind it used.

    `event_id` is the identity of what caused it: the request's own UUIDv7, or `training_event_id`.
    `occurred_at` is Unix time in seconds and, like the id, the same on every replay.
    `context_length` selects the price tier. `reserved_nano_usd` is how much of the lease
    `lease_id` the sender has used up for it.
    """

    event_id: str
    occurred_at: float
    tenant_id: str
    key_id: str
    base_model: str
    context_length: int
    quantities: dict[UsageKind, int]
    run_id: str | None = None
    session_id: str | None = None
    policy_version: str | None = None
    user: str | None = None
    lease_id: str | None = None
    reserved_nano_usd: int = 0


class RunAdvanced(Event, frozen=True, tag="run_advanced"):
    """A run finished operation `seq` and stands at `step`; `lost` says why what it had learned is gone, if it is."""

    run_id: str
    seq: int
    step: int
    occurred_at: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    lost: str | None = None


class CheckpointSaved(Event, frozen=True, tag="checkpoint_saved"):
    """`mode` is `training`, `inference` or `external`; saving under a name again replaces that checkpoint."""

    checkpoint_id: str
    run_id: str
    tenant_id: str
    base_model: str
    name: str
    mode: str
    step: int
    location: str
    size_bytes: int
    created_at: float
    expires_at: float | None = None
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])


class TokensCounted(Event, frozen=True, tag="tokens_counted"):
    """What an engine or trainer has produced since it started, by its own counters; said now and then.

    `final` is its last word: a process that ends without it may have produced more.
    """

    producer_id: str
    base_model: str
    started_at: float
    counted_at: float
    tokens: dict[UsageKind, int]
    final: bool = False


AnyEvent = UsageEvent | RunAdvanced | CheckpointSaved | TokensCounted


def usage_subject(tenant_id: str) -> str:
    """Where a tenant's usage is published."""
    return f"usage.{tenant_id}"


def catalog_subject(run_id: str) -> str:
    """Where news of a run is published."""
    return f"catalog.{run_id}"


def counts_subject(producer_id: str) -> str:
    """Where an engine or trainer says what it has produced."""
    return f"catalog.counts.{producer_id}"


def operation_id(run_id: str, seq: int) -> str:
    """The identity of operation `seq` of a run."""
    return f"{run_id}-{seq}"


def training_event_id(operation: str) -> str:
    """The identity of a training operation's usage, the same on every replay."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"river:{operation}"))
