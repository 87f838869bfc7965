"""Engines and trainers as admins see them, and what they can be told to do."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast, get_args

import msgspec

from river_client.audit_wire import AuditAction
from river_client.machine_wire import (
    Engine,
    EngineAdapter,
    MachineAction,
    MachineProblem,
    MachineTold,
    Trainer,
)
from river_engine.protocol import Control, Controlled, control_subject
from river_gateway.errors import ConflictError, NotFoundError, UnavailableError
from river_gateway.limits import CONTROL_TIMEOUT_S
from river_gateway.tenancy import audit
from river_trainer.protocol import PHASES, trainer_control_subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_engine.protocol import EngineRecord, Problem
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor
    from river_trainer.protocol import TrainerRecord

ACTIONS: tuple[MachineAction, ...] = get_args(MachineAction)


def list_engines(services: Services) -> list[Engine]:
    """Those that are alive, by id."""
    alone = _left_alone(services)
    records = sorted(services.engines.alive(), key=lambda record: record.engine_id)
    return [_engine(record, alone.get(record.engine_id, 0)) for record in records]


def list_trainers(services: Services) -> list[Trainer]:
    """Those that are alive, by id."""
    records = sorted(services.trainers.alive(), key=lambda record: record.trainer_id)
    return [_trainer(record) for record in records]


def find_engine(services: Services, engine_id: str) -> Engine:
    """One that is alive.

    Raises:
        NotFoundError: none of that id is.
    """
    for engine in list_engines(services):
        if engine.engine_id == engine_id:
            return engine
    raise NotFoundError(f"no engine {engine_id!r} is alive")


def find_trainer(services: Services, trainer_id: str) -> Trainer:
    """One that is alive; raises as `find_engine` does."""
    for trainer in list_trainers(services):
        if trainer.trainer_id == trainer_id:
            return trainer
    raise NotFoundError(f"no trainer {trainer_id!r} is alive")


async def tell_engine(
    services: Services, by: Actor, engine_id: str, action: MachineAction
) -> MachineTold:
    """Tells an engine what to do, and the audit log who wanted it.

    Raises:
        NotFoundError: none of that id is alive.
        ConflictError: it does not do as it is told; the message says why.
        UnavailableError: it does not answer.
    """
    engine = find_engine(services, engine_id)
    await _note(services, by, f"engines.{action}", engine_id, engine.base_model)
    return await _tell(services, control_subject(engine_id), engine_id, action)


async def tell_trainer(
    services: Services, by: Actor, trainer_id: str, action: MachineAction
) -> MachineTold:
    """Tells a trainer what to do; raises as `tell_engine` does."""
    trainer = find_trainer(services, trainer_id)
    await _note(services, by, f"trainers.{action}", trainer_id, trainer.base_model)
    return await _tell(services, trainer_control_subject(trainer_id), trainer_id, action)


async def _note(services: Services, by: Actor, action: str, subject: str, base_model: str) -> None:
    """Before it is done: what an engine does is in no transaction with the log."""
    details = {"base_model": base_model}
    await audit.write(
        services.pool,
        by,
        cast("AuditAction", action),
        subject=subject,
        tenant_id=None,
        details=details,
    )


async def _tell(
    services: Services, subject: str, machine_id: str, action: MachineAction
) -> MachineTold:
    services.bus.require()
    control = msgspec.msgpack.encode(Control(action=action))
    answer = await services.bus.ask(subject, control, timeout_s=CONTROL_TIMEOUT_S)
    if answer is None:
        raise UnavailableError(f"{machine_id} does not answer; try again")
    told = msgspec.msgpack.decode(answer, type=Controlled)
    if told.refused is not None:
        raise ConflictError(told.refused)
    return MachineTold(machine_id=machine_id, action=action, draining=told.draining)


def _left_alone(services: Services) -> dict[str, int]:
    """How many gateways leave which engines alone: by their last word, and by this one's of now."""
    told: dict[str, int] = {}
    for moment in reversed(services.health.moments()):
        if moment.gateways:
            told = dict(moment.failing)
            break
    for engine_id in services.upstream.fleet.failing():
        told[engine_id] = max(1, told.get(engine_id, 0))
    return told


def _engine(record: EngineRecord, left_alone_by: int) -> Engine:
    health, now = record.health, time.time()
    state = "draining" if record.draining else "left alone" if left_alone_by else "serving"
    times = health.load_times
    return Engine(
        engine_id=record.engine_id,
        base_model=record.base_model,
        state=state,
        url=record.url,
        started_at=_moment(health.started_at),
        heard_s=_passed(record.heartbeat_at, now),
        context_length=record.context_length,
        inside=health.inside,
        waiting=health.waiting,
        batch=health.batch,
        batch_max=health.batch_max,
        outstanding_tokens=record.outstanding_tokens,
        tokens_per_s=health.tokens_per_s,
        slots_used=health.slots_used,
        slots=record.max_loras,
        kv_cache_used=health.kv_cache_used,
        prefix_hit_rate=health.prefix_hit_rate,
        adapters=[
            EngineAdapter(
                name=adapter.name,
                held_s=_passed(adapter.loaded_at, now),
                unused_s=_passed(adapter.used_at, now),
            )
            for adapter in reversed(health.adapters)
        ],
        adapters_held=len(record.resident),
        adapters_loading=list(record.loading),
        loads=times.loads if times else 0,
        fetch_median_ms=times.fetch_median_ms if times else None,
        load_median_ms=times.load_median_ms if times else None,
        load_p99_ms=times.load_p99_ms if times else None,
        left_alone_by=left_alone_by,
        restarts=health.ends,
        problems=_problems(health.problems),
    )


def _trainer(record: TrainerRecord) -> Trainer:
    health = record.health
    state = "draining" if record.draining else "training" if health.batches else "idle"
    return Trainer(
        trainer_id=record.trainer_id,
        base_model=record.base_model,
        state=state,
        started_at=_moment(health.started_at),
        heard_s=_passed(record.heartbeat_at, time.time()),
        context_length=record.context_length,
        max_lora_rank=record.max_lora_rank,
        runs=record.runs,
        runs_device=health.runs_device,
        runs_memory=health.runs_memory,
        runs_disk=health.runs_disk,
        waiting=health.waiting,
        waiting_tokens=health.waiting_tokens,
        window_s=health.window_s,
        batches=health.batches,
        steps_per_s=health.steps_per_s,
        tokens_per_s=health.tokens_per_s,
        phase_s={phase: health.phase_s.get(phase, 0.0) for phase in PHASES},
        unsaved_runs=health.unsaved_runs,
        snapshot_age_s=health.snapshot_age_s,
        problems=_problems(health.problems),
    )


def _problems(problems: Sequence[Problem]) -> list[MachineProblem]:
    """Newest first."""
    return [
        MachineProblem(
            at=datetime.fromtimestamp(problem.at, UTC).isoformat(),
            message=problem.message,
            count=problem.count,
        )
        for problem in reversed(problems)
    ]


def _moment(unix_s: float) -> str | None:
    """A time as it is written; None of one that is not told."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat() if unix_s else None


def _passed(since: float, now: float) -> float:
    """Seconds; clocks of several machines may differ a little."""
    return max(0.0, now - since)
