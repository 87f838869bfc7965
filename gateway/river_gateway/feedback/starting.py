"""Telling a run to learn from feedback, and to stop: what the API and the dashboard have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_client import wire
from river_gateway.checkpoints import aliases, catalog
from river_gateway.errors import ConflictError, NotFoundError
from river_gateway.feedback import learning, rewards
from river_gateway.tenancy import audit
from river_gateway.training import operations, validation

if TYPE_CHECKING:
    from river_client.learning_wire import LearningState, StartLearning
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor


async def start_learning(
    services: Services,
    *,
    run_id: str,
    tenant_id: str,
    key_id: str,
    settings: StartLearning,
    by: Actor,
) -> LearningState:
    """Tells a run to train on the feedback on a model name, in the name of a key; the same again is a no-op.

    Raises:
        InvalidFieldError: a setting is wrong.
        ConflictError: the run is lost, imported, or learning something else, or too many others are learning.
        NotFoundError: there is no such run, or nobody can be served by the model name.
    """
    run = await services.runs.current(run_id, tenant_id)
    await _check(services, run, settings, tenant_id)
    seq = await operations.next_seq(services, run)
    if settings.publish == "live":
        follow = wire.PutAlias(target=f"{catalog.SCHEME}{run_id}")
        await aliases.point(services, tenant_id=tenant_id, name=settings.alias, asked=follow, by=by)
    async with audit.recorded(services.pool, by, "learning.start") as line:
        state = await learning.start(
            line.connection,
            run_id=run_id,
            tenant_id=tenant_id,
            key_id=key_id,
            settings=settings,
            seq=seq,
            step=run.step,
        )
        line.about(run_id, tenant_id=tenant_id, details=settings)
    await services.names.changed(tenant_id, learning.name_of(run_id))
    services.learning_wake.set()
    return state


async def stop_learning(
    services: Services, *, run_id: str, tenant_id: str, by: Actor
) -> LearningState:
    """Ends it once the batch at hand has been applied: `status` says whether it has been; again is a no-op.

    Raises:
        NotFoundError: the run has never learnt from feedback, or is no run of this tenant's.
    """
    async with audit.recorded(services.pool, by, "learning.stop") as line:
        state = await learning.stop(line.connection, run_id=run_id, tenant_id=tenant_id)
        line.about(run_id, tenant_id=tenant_id)
    await services.names.changed(tenant_id, learning.name_of(run_id))
    return state


async def _check(
    services: Services, run: catalog.RunRow, settings: StartLearning, tenant_id: str
) -> None:
    """Makes sure that a run can learn as asked.

    Raises:
        InvalidFieldError: a setting is wrong.
        ConflictError: the run is lost, imported, or learning something else, or too many others are learning.
        NotFoundError: nobody can be served by the model name.
    """
    if run.imported:
        raise ConflictError(
            f"{run.run_id} is an imported adapter; start a run from its checkpoint", param="run_id"
        )
    if run.lost is not None:
        raise ConflictError(f"{run.run_id} is lost: {run.lost}", param="run_id")
    if settings.publish == "live":
        validation.name(settings.alias, "alias")
    rewards.check_size(settings.min_batch, settings.max_batch)
    validation.loss_config(settings.loss_fn, settings.loss_config)
    validation.adam(settings.adam)
    if (
        settings.publish == "none"
        and settings.alias not in services.engines.bases()
        and await services.names.alias(settings.alias, tenant_id) is None
    ):
        raise NotFoundError(f"there is no alias {settings.alias!r}", param="alias")
    current = await learning.find(services.pool, run_id=run.run_id, tenant_id=tenant_id)
    learning.check_startable(current, settings)
    await learning.check_room(services.pool, run_id=run.run_id, tenant_id=tenant_id)
