"""What a model name means to a tenant: a base model, a run's live version, a checkpoint, or an alias of these.

An alias may share its requests among several targets by weight. A request says which version it wants with the header
`x-river-policy-version`; without it, those of one `user` or `prompt_cache_key` stay with one target, and others are
shared at random. What answers is settled once, when the request begins.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from river_engine.protocol import AdapterRef
from river_gateway.checkpoints import catalog
from river_gateway.errors import (
    InvalidFieldError,
    NotFoundError,
    PrunedError,
    UnavailableError,
    UnknownModelError,
)
from river_trainer.protocol import policy_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from river_client.wire import AliasTarget
    from river_gateway.checkpoints.catalog import CheckpointRow, RunRow
    from river_gateway.services import Services

Answer = TypeVar("Answer")

POLICY_VERSION_HEADER = "x-river-policy-version"
_VERSION = re.compile(r"(?P<run>run_[A-Za-z0-9]+)@(?P<step>0|[1-9][0-9]{0,15})")


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: a base model and, unless it answers itself, an adapter on it.

    `follows` is the run whose live version it is, if it is one: another may take its place.
    """

    base_model: str
    adapter: AdapterRef | None
    policy_version: str
    run_id: str | None = None
    follows: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says of the version that is to answer: `pin` names it, equal `stick` keep to one target."""

    pin: str | None = None
    stick: bytes | None = None


_NO_WISH = Wish()


async def resolve_model(
    services: Services, name: str, tenant_id: str, wish: Wish = _NO_WISH
) -> Target:
    """The target of a model name.

    Raises:
        UnknownModelError: it is nothing of this tenant's; another tenant's is not told apart from nothing.
        InvalidFieldError: the version that is asked for is none that the model could answer with.
        NotFoundError: it was one, but is gone.
        UnavailableError: it has no version to answer with yet, or nobody knows yet whether it is a base model.
    """
    if name in services.engines.bases():
        _check_pin(wish.pin, name, (name,))
        return Target(name, None, name)
    if not name.isprintable():
        raise _unknown(name)
    try:
        if name.startswith(catalog.SCHEME):
            if wish.pin is not None:
                return await _pinned(services, name, (name,), tenant_id, wish.pin)
            return await _resolve_path(services, name, tenant_id)
        served = await services.names.alias(name, tenant_id)
        if served is None and not services.registered:
            raise UnavailableError("the registry of base models is being read; try again")
        if served is None:
            raise _unknown(name)
        if wish.pin is not None:
            return await _pinned(services, name, served.ever, tenant_id, wish.pin)
        path = choose_target(served.alias.targets, name, wish.stick)
        return await _resolve_aliased(services, path, tenant_id)
    except _GoneError:
        raise _unknown(name) from None


async def _resolve_aliased(services: Services, path: str, tenant_id: str) -> Target:
    """What an alias points at: a base model, a checkpoint or a run."""
    if path in services.engines.bases():
        return Target(path, None, path)
    if catalog.parse_path(path) is None and not services.registered:
        raise UnavailableError("the registry of base models is being read; try again")
    return await _resolve_path(services, path, tenant_id)


async def ask_current(
    services: Services,
    tenant_id: str,
    target: Target,
    ask: Callable[[Target], Awaitable[Answer]],
) -> tuple[Target, Answer]:
    """Who answered, `target` or what has replaced it since, and the answer.

    A run's live version may be pruned between being resolved and being loaded; then the run is looked up once more.

    Raises:
        UnloadableError: the weights cannot be loaded.
        NotFoundError: the version asked for is no longer kept.
    """
    try:
        return target, await ask(target)
    except PrunedError:
        if target.follows is None:
            if target.adapter is not None and target.adapter.name == target.policy_version:
                raise _not_kept(target.policy_version) from None
            raise
        current = await _resolve_path(services, target.follows, tenant_id)
        if current == target:
            raise
    return current, await ask(current)


def choose_target(targets: Sequence[AliasTarget], name: str, stick: bytes | None) -> str:
    """One of the targets by weight: at random, or always the same for the same `stick`."""
    if len(targets) == 1:
        return targets[0].target
    total = sum(entry.weight for entry in targets)
    if stick is None:
        place = random.randrange(total)  # noqa: S311 - shares, not secrets
    else:
        digest = hashlib.blake2b(name.encode() + b"\0" + stick, digest_size=8).digest()
        place = int.from_bytes(digest) * total >> 64
    for entry in targets:
        place -= entry.weight
        if place < 0:
            return entry.target
    raise AssertionError("weights do not add up")


# ---- Pins ------------------------------------------------------------------------------------------------------------


async def _pinned(
    services: Services,
    name: str,
    could_be: Sequence[str] | frozenset[str],
    tenant_id: str,
    pin: str,
) -> Target:
    """The version that a request insists on, which has to be of a run, or a base model, that `could_be` names."""
    _check_pin(pin, name, could_be)
    if pin in services.engines.bases():
        return Target(pin, None, pin)
    if pin.startswith(catalog.SCHEME):
        return await _resolve_path(services, pin, tenant_id)
    version = _VERSION.fullmatch(pin)
    if version is None:  # A base model that has no engine.
        raise UnavailableError(f"no engine of {pin!r} answers at the moment; try again")
    run = await _find_run(services, version["run"], tenant_id)
    step = int(version["step"])
    row = await services.names.checkpoint_of_step(run.run_id, step, tenant_id)
    if row is not None:
        return _of_checkpoint(row, tenant_id)
    live = await services.live.of(run.run_id)
    adapter = live.earlier(step)
    if adapter is None:
        raise _not_kept(pin)
    return Target(run.base_model, adapter, policy_version(run.run_id, step), run.run_id)


def _check_pin(pin: str | None, name: str, could_be: Sequence[str] | frozenset[str]) -> None:
    """Raises InvalidFieldError unless what a request insists on is something that `name` could be."""
    if pin is None or pin in could_be:
        return
    version = _VERSION.fullmatch(pin)
    path = catalog.parse_path(pin)
    run_id = version["run"] if version else path.run_id if path else None
    if run_id is None or run_id not in {_run_of(target) for target in could_be}:
        raise InvalidFieldError(
            f"{POLICY_VERSION_HEADER}: {pin!r} is no version that `{name}` could answer with; give run_…@<step> or the "
            "path of a checkpoint of a run that it serves or has served",
            param=POLICY_VERSION_HEADER,
        )


def _run_of(target: str) -> str | None:
    path = catalog.parse_path(target)
    return path.run_id if path else None


def _not_kept(version: str) -> NotFoundError:
    return NotFoundError(
        f"{POLICY_VERSION_HEADER}: {version!r} is no longer kept; only the newest versions of a run and those saved as "
        "checkpoints are",
        param=POLICY_VERSION_HEADER,
    )


# ---- Paths -----------------------------------------------------------------------------------------------------------


class _GoneError(Exception):
    """What a path names is not there."""


async def _resolve_path(services: Services, text: str, tenant_id: str) -> Target:
    path = catalog.parse_path(text)
    if path is None:
        raise _GoneError
    if path.name is not None:
        try:
            return _of_checkpoint(await services.names.checkpoint(text, tenant_id), tenant_id)
        except NotFoundError:
            raise _GoneError from None
    run = await _find_run(services, path.run_id, tenant_id)
    live = await services.live.of(run.run_id)
    version = policy_version(run.run_id, live.step)
    return Target(run.base_model, live.adapter, version, run.run_id, follows=text)


async def _find_run(services: Services, run_id: str, tenant_id: str) -> RunRow:
    try:
        return await services.runs.find(run_id, tenant_id)
    except NotFoundError:
        raise _GoneError from None


def _of_checkpoint(row: CheckpointRow, tenant_id: str) -> Target:
    """What a checkpoint answers with. Of another tenant's, the run is not named: whose it is would see the use."""
    checkpoint = row.checkpoint
    if checkpoint.mode == "external":
        raise InvalidFieldError(
            f"model: {checkpoint.path} is for use elsewhere; one saved for inference or training can be sampled from",
            param="model",
        )
    return Target(
        checkpoint.base_model,
        AdapterRef(name=checkpoint.checkpoint_id, location=row.location),
        checkpoint.policy_version,
        checkpoint.run_id if row.tenant_id == tenant_id else None,
    )


def _unknown(name: str) -> UnknownModelError:
    return UnknownModelError(
        f"The model `{name}` does not exist or you do not have access to it.", param="model"
    )
