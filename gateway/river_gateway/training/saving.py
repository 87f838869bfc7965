"""What is asked for when weights are saved, checked: the name, whether it is taken, and whom they are encrypted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.checkpoints import catalog
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.ids import checkpoint_id
from river_gateway.limits import AGE_RECIPIENTS_MAX
from river_gateway.training import validation
from river_trainer import protocol
from river_trainer.encryption import recipient_key
from river_trainer.errors import InvalidTaskError

if TYPE_CHECKING:
    from river_client import wire
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.services import Services


async def save_task(
    services: Services, run: RunRow, tenant_id: str, seq: int, save: wire.SaveWeights
) -> protocol.SaveWeights:
    """The trainer's task of a save.

    Raises:
        InvalidFieldError: a field is wrong.
        ConflictError: the name is taken by another checkpoint, which is not to be replaced.
    """
    identity = checkpoint_id(protocol.operation_id(run.run_id, seq))
    task = protocol.SaveWeights(
        checkpoint_id=identity,
        name=validation.name(save.name, "name"),
        mode=save.mode,
        ttl_s=validation.ttl_s(save.ttl_s),
        user_metadata=validation.tags(save.user_metadata, "user_metadata"),
        age_recipients=_age_recipients(save.age_recipients, save.mode),
    )
    if not save.overwrite:
        path = catalog.checkpoint_path(run.run_id, save.mode, save.name)
        await _check_free(services, path, tenant_id, identity)
    return task


async def _check_free(services: Services, path: str, tenant_id: str, identity: str) -> None:
    """Raises ConflictError when another checkpoint has the path; the same save may be sent again."""
    try:
        row = await catalog.find_checkpoint(services.pool, path=path, tenant_id=tenant_id)
    except NotFoundError:
        return
    if row.checkpoint.checkpoint_id != identity:
        raise ConflictError(
            f"name: there is a checkpoint {row.checkpoint.name!r} already; overwrite=true replaces it",
            param="name",
        )


def _age_recipients(values: list[str], mode: wire.SaveMode) -> tuple[str, ...]:
    if values and mode != "external":
        raise InvalidFieldError(
            f"age_recipients: a checkpoint for {mode} cannot be encrypted, only an external one can",
            param="age_recipients",
        )
    if len(values) > AGE_RECIPIENTS_MAX:
        raise InvalidFieldError(
            f"age_recipients: {len(values)}, at most {AGE_RECIPIENTS_MAX}", param="age_recipients"
        )
    for index, value in enumerate(values):
        try:
            recipient_key(value)
        except InvalidTaskError as error:
            field = f"age_recipients[{index}]"
            raise InvalidFieldError(f"{field}: {error}", param=field) from None
    return tuple(values)
