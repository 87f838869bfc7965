"""The structs of engines and trainers under `/river/v1/engines` and `/river/v1/trainers`, for admins."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from river_client.wire import Wire

MachineAction = Literal["drain", "undrain", "restart"]
"""`drain`: end what has begun and begin nothing new. `restart`: drain, leave, and be started again."""


class MachineProblem(Wire, frozen=True):
    """What an engine or trainer has warned of, `count` times in a row, last at `at` (ISO 8601)."""

    at: str
    message: str
    count: int = 1


class EngineAdapter(Wire, frozen=True):
    """An adapter that an engine holds: for how long, and how long nobody has used it; seconds."""

    name: str
    held_s: float
    unused_s: float


class Engine(Wire, frozen=True):
    """An engine that is alive.

    `state` is `serving`, `draining` or `left alone`: by `left_alone_by` gateways, because it has failed them. Of at
    most `batch_max` sequences `batch` are in its batch; `waiting` prompts wait. `kv_cache_used` and `prefix_hit_rate`
    are shares, absent while unknown; times of loads are of the last `loads` adapters. `restarts` counts how often its
    server has ended and come back.
    """

    engine_id: str
    base_model: str
    state: str
    url: str
    started_at: str | None
    heard_s: float
    context_length: int
    inside: int
    waiting: int
    batch: int
    batch_max: int
    outstanding_tokens: int
    tokens_per_s: float
    slots_used: int
    slots: int
    kv_cache_used: float | None = None
    prefix_hit_rate: float | None = None
    adapters: list[EngineAdapter] = field(default_factory=list[EngineAdapter])
    adapters_held: int = 0
    adapters_loading: list[str] = field(default_factory=list[str])
    loads: int = 0
    fetch_median_ms: float | None = None
    load_median_ms: float | None = None
    load_p99_ms: float | None = None
    left_alone_by: int = 0
    restarts: int = 0
    problems: list[MachineProblem] = field(default_factory=list[MachineProblem])


class Trainer(Wire, frozen=True):
    """A trainer that is alive.

    `state` is `training`, `idle` or `draining`. Rates and `phase_s`, the seconds by phase, are of the last `window_s`;
    `publish` happens beside the next batch. `unsaved_runs` have operations that only the journal holds; the oldest of
    their snapshots is `snapshot_age_s` old.
    """

    trainer_id: str
    base_model: str
    state: str
    started_at: str | None
    heard_s: float
    context_length: int
    max_lora_rank: int
    runs: int
    runs_device: int
    runs_memory: int
    runs_disk: int
    waiting: int
    waiting_tokens: int
    window_s: float
    batches: int
    steps_per_s: float
    tokens_per_s: float
    phase_s: dict[str, float] = field(default_factory=dict[str, float])
    unsaved_runs: int = 0
    snapshot_age_s: float = 0.0
    problems: list[MachineProblem] = field(default_factory=list[MachineProblem])


class Machines(Wire, frozen=True):
    """All that are alive, by their ids."""

    engines: list[Engine] = field(default_factory=list[Engine])
    trainers: list[Trainer] = field(default_factory=list[Trainer])


class MachineTold(Wire, frozen=True):
    """An engine or trainer does as it was told; whether it takes nothing new from now on."""

    machine_id: str
    action: str
    draining: bool
