"""Opening runs: what a new adapter is to be, checked against the trainers and engines that will hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from river_client import wire
from river_gateway.bus import BusError
from river_gateway.checkpoints import catalog
from river_gateway.codec import IDEMPOTENCY_HEADER
from river_gateway.errors import (
    ConflictError,
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    UnavailableError,
)
from river_gateway.ids import idempotent_id, seed_of
from river_gateway.training import operations, validation
from river_trainer import protocol

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal


async def open_run(
    services: Services, principal: Principal, asked: wire.CreateRun, *, identity: str | None
) -> RunRow:
    """A new run, or the one opened before under the same `identity`.

    The trainer makes its adapter as operation 0, which can be awaited like any other.

    Raises:
        InvalidFieldError: a field is wrong, or the checkpoint does not fit.
        NotFoundError: the session, the base model or the checkpoint is unknown.
        ConflictError: another run was opened under `identity`.
        UnavailableError: the message bus is down, or has not told yet which base models there are.
    """
    await catalog.check_open_session(
        services.pool, session_id=asked.session_id, tenant_id=principal.tenant_id
    )
    trainer = services.trainers.last_of(asked.base_model)
    if trainer is None:
        raise _no_trainer(services, asked.base_model)
    run_id = idempotent_id("run", principal.tenant_id, identity)
    source = None
    if asked.checkpoint is not None:
        source = await operations.find_source(services, asked.checkpoint, principal.tenant_id)
    lora_asked = asked.lora or (source.lora if source else wire.LoraConfig())
    shape = validation.adapter_shape(
        lora_asked, rank_max(services, asked.base_model), default_seed=seed_of(run_id)
    )
    lora = msgspec.structs.replace(lora_asked, alpha=shape.alpha, seed=shape.seed)
    if source is not None:
        operations.check_source(
            source,
            field="checkpoint",
            base_model=asked.base_model,
            lora=lora,
            with_optimizer=asked.optimizer,
        )
    is_new = await catalog.insert_run(
        services.pool,
        run_id=run_id,
        tenant_id=principal.tenant_id,
        session_id=asked.session_id,
        base_model=asked.base_model,
        lora=lora,
        context_length=trainer.context_length,
        user_metadata=validation.tags(asked.user_metadata, "user_metadata"),
    )
    run = await catalog.find_run(services.pool, run_id=run_id, tenant_id=principal.tenant_id)
    if (run.session_id, run.base_model, run.lora) != (asked.session_id, asked.base_model, lora):
        raise ConflictError(
            f"{IDEMPOTENCY_HEADER}: another run was made under this key", param=IDEMPOTENCY_HEADER
        )
    try:
        task = protocol.CreateRun(
            shape=shape,
            checkpoint=source.location if source else None,
            optimizer=asked.optimizer,
        )
        await operations.publish_task(services, run, principal, 0, task)
    except (BusError, UnavailableError):
        if is_new:
            await catalog.delete_unstarted_run(services.pool, run_id)
        raise
    return run


def _no_trainer(services: Services, base_model: str) -> GatewayError:
    if not services.registered:
        return UnavailableError("the registry of base models is being read; try again")
    if base_model in services.engines.bases():
        return InvalidFieldError(
            f"base_model: {base_model!r} cannot be trained here", param="base_model"
        )
    return NotFoundError(f"there is no base model {base_model!r}", param="base_model")


def rank_max(services: Services, base_model: str) -> int:
    """What the trainers and the engines of a base can all hold."""
    known = services.trainers.last_of(base_model), services.engines.last_of(base_model)
    return min(record.max_lora_rank for record in known if record is not None)
