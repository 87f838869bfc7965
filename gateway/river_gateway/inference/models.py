"""What a model name means to a tenant: a base model, a run's live version, a checkpoint, or an alias of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from river_engine.protocol import AdapterRef
from river_gateway.checkpoints import catalog
from river_gateway.errors import (
    NotFoundError,
    PrunedError,
    UnavailableError,
    UnknownModelError,
)
from river_trainer.protocol import LIVE_BUCKET, LiveVersion, policy_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from river_gateway.services import Services

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: a base model and, unless it answers itself, an adapter on it."""

    base_model: str
    adapter: AdapterRef | None
    policy_version: str
    run_id: str | None = None


async def resolve_model(services: Services, name: str, tenant_id: str) -> Target:
    """The target of a model name.

    Raises:
        UnknownModelError: it is nothing of this tenant's; another tenant's is not told apart from nothing.
        UnavailableError: it has no version to answer with yet, or nobody knows yet whether it is a base model.
    """
    if name in services.engines.bases():
        return Target(name, None, name)
    if not name.isprintable():
        raise _unknown(name)
    path = name
    if not name.startswith(catalog.SCHEME):
        alias = await catalog.find_alias(services.pool, tenant_id=tenant_id, name=name)
        if alias is None and not services.registered:
            raise UnavailableError("the registry of base models is being read; try again")
        if alias is None:
            raise _unknown(name)
        path = alias.target
    try:
        return await _resolve_path(services, path, tenant_id)
    except NotFoundError:
        raise _unknown(name) from None


async def ask_current(
    services: Services,
    name: str,
    tenant_id: str,
    target: Target,
    ask: Callable[[Target], Awaitable[Answer]],
) -> tuple[Target, Answer]:
    """Who answered to a model name, `target` or what has replaced it since, and the answer.

    A run's live version may be pruned between being resolved and being loaded; then the name is resolved once more.

    Raises:
        UnloadableError: the weights cannot be loaded.
    """
    try:
        return target, await ask(target)
    except PrunedError:
        current = await resolve_model(services, name, tenant_id)
        if current == target:
            raise
    return current, await ask(current)


async def _resolve_path(services: Services, text: str, tenant_id: str) -> Target:
    path = catalog.parse_path(text)
    if path is None:
        raise _unknown(text)
    if path.name is None:
        run = await services.runs.find(path.run_id, tenant_id)
        live = await _live_version(services, run.run_id)
        return Target(
            run.base_model, live.adapter, policy_version(run.run_id, live.step), run.run_id
        )
    row = await catalog.find_checkpoint(services.pool, path=text, tenant_id=tenant_id)
    checkpoint = row.checkpoint
    return Target(
        checkpoint.base_model,
        AdapterRef(name=checkpoint.checkpoint_id, location=row.location),
        checkpoint.policy_version,
        checkpoint.run_id,
    )


async def _live_version(services: Services, run_id: str) -> LiveVersion:
    """Asked of NATS each time, so that a version is seen as soon as the result that made it."""
    value = await services.bus.get(LIVE_BUCKET, run_id)
    if value is None:
        raise UnavailableError(f"the run {run_id!r} has no version yet; try again")
    return msgspec.msgpack.decode(value, type=LiveVersion)


def _unknown(name: str) -> UnknownModelError:
    return UnknownModelError(
        f"The model `{name}` does not exist or you do not have access to it.", param="model"
    )
