"""The JSON bodies of the Tinker protocol that tell of runs, checkpoints, sessions, usage and keys."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from river_gateway.dialects.tinker.bodies import Asked, OptimizerConfig, Told

CheckpointType = Literal["training", "sampler", "external"]

# ---- Runs and checkpoints --------------------------------------------------------------------------------------------


class Checkpoint(Told, frozen=True):
    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: str
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str]
    expires_at: str | None = None


class Cursor(Told, frozen=True):
    offset: int
    limit: int
    total_count: int


class Checkpoints(Told, frozen=True):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Told, frozen=True):
    """`corrupted` is one whose weights are lost."""

    training_run_id: str
    base_model: str
    model_owner: str
    lora_rank: int
    last_request_time: str
    corrupted: bool
    user_metadata: dict[str, str]
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    is_lora: bool = True


class TrainingRuns(Told, frozen=True):
    training_runs: list[TrainingRun]
    cursor: Cursor


class OfPath(Asked, frozen=True):
    tinker_path: str


class WeightsInfo(Told, frozen=True):
    base_model: str
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    is_lora: bool = True
    optimizer_config: OptimizerConfig = OptimizerConfig()


class SetTtl(Asked, frozen=True):
    """Seconds from now; null is for ever."""

    ttl_seconds: int | None


class ExternalUrls(Told, frozen=True):
    urls: dict[str, str]
    expires: str


class CopyWeights(Asked, frozen=True):
    """Into a project, or as the `model_seq_id`-th run of a session."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class Copied(Told, frozen=True):
    tinker_path: str


# ---- Sessions --------------------------------------------------------------------------------------------------------

EndReason = Literal["success", "errored", "interrupted"]


class SessionInfo(Told, frozen=True):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str]
    display_name: str | None = None


class SessionIds(Told, frozen=True):
    sessions: list[str]


class Owner(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`owner_urns` are ids of keys."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = None


class StatusQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[EndReason] | None = None


class SearchCursor(Struct, frozen=True, kw_only=True):
    last_created_at: dt.datetime
    last_session_id: str


class SearchSessions(Asked, frozen=True):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])
    display_name: str | None = None
    owner: Owner = Owner()
    statuses: list[StatusQuery] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


class FoundSession(Told, frozen=True):
    session_id: str
    created_at: str
    owner: str
    project_id: str
    status: dict[str, Any]
    checkpoints_count: int
    checkpoint_storage_bytes: int
    user_metadata: dict[str, str]
    display_name: str | None = None


class FoundSessions(Told, frozen=True):
    sessions: list[FoundSession]
    next_cursor: SearchCursor | None = None


class FinishReason(Struct, frozen=True, kw_only=True):
    type: EndReason = "success"


class FinishSession(Asked, frozen=True):
    reason: FinishReason = FinishReason()
    detail: str | None = None


class SetProject(Asked, frozen=True):
    project_id: str


class TraceExport(Told, frozen=True):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


# ---- Usage, audit, keys ----------------------------------------------------------------------------------------------


class UsageEvent(Told, frozen=True):
    """What a key used of one kind in one hour."""

    bucket_start: str
    bucket_end: str
    base_model: str | None
    user_id: str | None
    user_name: str | None
    session_id: str | None
    project_id: str | None
    estimated_cost_usd: float
    event_info: dict[str, Any]
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None


class UsageSession(Told, frozen=True):
    user_metadata: dict[str, str]


class Usage(Told, frozen=True):
    data: list[UsageEvent]
    sessions: dict[str, UsageSession]
    cost_data_through: str


class StorageUse(Told, frozen=True):
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: str | None = None
    user_name: str | None = None
    estimated_monthly_cost_usd: float | None = None


class StorageUses(Told, frozen=True):
    data: list[StorageUse]
    effective_rate_usd_per_gigabyte_month: float | None = None


class AuditEntry(Told, frozen=True):
    timestamp: str
    event: str
    event_details: dict[str, Any]


class Audit(Told, frozen=True):
    entries: list[AuditEntry]


class KeyInfo(Told, frozen=True):
    key_id: int
    name: str
    note: str
    details: dict[str, Any]
