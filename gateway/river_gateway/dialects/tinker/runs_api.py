"""The routes about runs and their checkpoints: looking at them, showing, copying, downloading, ending them."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from litestar import Response, delete, get, post, put

from river_gateway.checkpoints import catalog, sharing
from river_gateway.checkpoints.lifetime import set_ttl
from river_gateway.checkpoints.removal import remove_checkpoint
from river_gateway.checkpoints.sharing import Place
from river_gateway.checkpoints.sharing_api import signed_urls
from river_gateway.context import context_of
from river_gateway.dialects.tinker import listing
from river_gateway.dialects.tinker import rest_bodies as bodies
from river_gateway.dialects.tinker.http import AnyRequest, identity_of, read, told
from river_gateway.dialects.tinker.ids import SCHEME, model_id, of_river, run_id_of
from river_gateway.dialects.tinker.runs import find_run, river_path
from river_gateway.errors import (
    ConflictError,
    InvalidFieldError,
    NotFoundError,
    UnsupportedFieldError,
)
from river_gateway.ids import idempotent_id
from river_gateway.limits import SEQ_MAX
from river_gateway.services import services_of
from river_gateway.tenancy import audit
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import session_list, validation

if TYPE_CHECKING:
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_SCOPES = requires("train", "infer")
_TRAIN = requires("train")
_CHECKPOINT = "/training_runs/{model:str}/checkpoints/{kind:str}/{name:str}"
_TOKEN_HEADER = "x-tinker-weights-access-token"  # noqa: S105 - the name of a header


def _actor(request: AnyRequest) -> audit.Actor:
    return audit.actor(principal_of(request), context_of(request.scope).request_id, "tinker")


# ---- Runs ------------------------------------------------------------------------------------------------------------


@get("/training_runs", guards=[_SCOPES])
async def get_training_runs(
    request: AnyRequest, limit: int = 20, offset: int = 0, project_id: str | None = None
) -> Response[bytes]:
    """A page of one's runs, newest first."""
    offset, limit = listing.page(offset, limit)
    found, total = await listing.runs(
        services_of(request).pool,
        principal_of(request).tenant_id,
        project_id=project_id,
        offset=offset,
        limit=limit,
    )
    cursor = bodies.Cursor(offset=offset, limit=limit, total_count=total)
    return told(bodies.TrainingRuns(training_runs=found, cursor=cursor))


@get("/training_runs/{model:str}", guards=[_SCOPES])
async def get_training_run(request: AnyRequest, model: str) -> Response[bytes]:
    """One run."""
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    run_id = (await find_run(services, model, tenant_id)).run_id
    current = await services.runs.current(run_id, tenant_id)
    (found,) = await listing.training_runs(services.pool, tenant_id, [current])
    return told(found)


@post("/weights_info", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def weights_info(request: AnyRequest) -> Response[bytes]:
    """What a checkpoint is made of: one's own, or one that is shown to all."""
    asked = await read(request, bodies.OfPath)
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    path = await river_path(services, asked.tinker_path, tenant_id, field="tinker_path")
    row = await _readable(services, path, asked.tinker_path, tenant_id)
    run = await services.runs.find(row.checkpoint.run_id, row.tenant_id)
    return told(
        bodies.WeightsInfo(
            base_model=run.base_model,
            lora_rank=run.lora.rank,
            train_unembed=run.lora.train_unembed,
            train_mlp=run.lora.train_mlp,
            train_attn=run.lora.train_attn,
        )
    )


async def _readable(
    services: Services, path: str, asked: str, tenant_id: str
) -> catalog.CheckpointRow:
    try:
        return await catalog.find_checkpoint(
            services.pool, path=path, tenant_id=tenant_id, public=True
        )
    except NotFoundError:
        raise NotFoundError(f"there is no checkpoint {asked!r}", param="path") from None


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@get("/training_runs/{model:str}/checkpoints", guards=[_SCOPES])
async def get_run_checkpoints(request: AnyRequest, model: str) -> Response[bytes]:
    """The checkpoints of a run, newest first."""
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    run = await find_run(services, model, tenant_id)
    found, _ = await listing.checkpoints(services.pool, tenant_id, run_id=run.run_id)
    return told(bodies.Checkpoints(checkpoints=found))


@get("/checkpoints", guards=[_SCOPES])
async def get_checkpoints(
    request: AnyRequest, limit: int = 100, offset: int = 0
) -> Response[bytes]:
    """A page of all one's checkpoints, newest first."""
    offset, limit = listing.page(offset, limit)
    found, total = await listing.checkpoints(
        services_of(request).pool, principal_of(request).tenant_id, offset=offset, limit=limit
    )
    cursor = bodies.Cursor(offset=offset, limit=limit, total_count=total)
    return told(bodies.Checkpoints(checkpoints=found, cursor=cursor))


async def _own(request: AnyRequest, model: str, kind: str, name: str) -> catalog.CheckpointRow:
    """One's own checkpoint of a URL.

    Raises:
        NotFoundError: there is none, told in the client's words.
    """
    text = f"{SCHEME}{model}/{kind}/{name}"
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    try:
        path = await river_path(services, text, tenant_id)
        return await catalog.find_checkpoint(services.pool, path=path, tenant_id=tenant_id)
    except NotFoundError:
        raise NotFoundError(f"there is no checkpoint {text!r}", param="path") from None


@delete(_CHECKPOINT, guards=[_TRAIN], status_code=HTTPStatus.NO_CONTENT)
async def delete_checkpoint(request: AnyRequest, model: str, kind: str, name: str) -> None:
    """Deletes a checkpoint and its files."""
    row = await _own(request, model, kind, name)
    await remove_checkpoint(
        services_of(request),
        path=row.checkpoint.path,
        tenant_id=row.tenant_id,
        log_ids=context_of(request.scope).log_ids(),
        by=_actor(request),
    )


@post(f"{_CHECKPOINT}/publish", guards=[_TRAIN], status_code=HTTPStatus.NO_CONTENT)
async def publish_checkpoint(request: AnyRequest, model: str, kind: str, name: str) -> None:
    """Lets everybody load a checkpoint and sample from it."""
    row = await _own(request, model, kind, name)
    await sharing.publish(
        services_of(request),
        tenant_id=row.tenant_id,
        path=row.checkpoint.path,
        by=_actor(request),
    )


@delete(f"{_CHECKPOINT}/publish", guards=[_TRAIN], status_code=HTTPStatus.NO_CONTENT)
async def unpublish_checkpoint(request: AnyRequest, model: str, kind: str, name: str) -> None:
    """Lets nobody else use a checkpoint any more."""
    row = await _own(request, model, kind, name)
    await sharing.unpublish(
        services_of(request),
        tenant_id=row.tenant_id,
        path=row.checkpoint.path,
        by=_actor(request),
    )


@put(f"{_CHECKPOINT}/ttl", guards=[_TRAIN], status_code=HTTPStatus.NO_CONTENT)
async def put_checkpoint_ttl(request: AnyRequest, model: str, kind: str, name: str) -> None:
    """Says how long a checkpoint is to live from now on."""
    asked = await read(request, bodies.SetTtl)
    row = await _own(request, model, kind, name)
    await set_ttl(
        services_of(request),
        tenant_id=row.tenant_id,
        path=row.checkpoint.path,
        ttl_s=asked.ttl_seconds,
        by=_actor(request),
    )


@get(f"{_CHECKPOINT}/external_weights_urls", guards=[_SCOPES])
async def get_external_weights_urls(
    request: AnyRequest, model: str, kind: str, name: str
) -> Response[bytes]:
    """A URL for each file of an external checkpoint, which opens it for an hour without a key."""
    row = await _own(request, model, kind, name)
    if row.checkpoint.mode != "external":
        raise InvalidFieldError(
            f"path: {kind}/{name} is for use here; save_weights_external makes one to download",
            param="path",
        )
    urls, expires_at = await signed_urls(request, row)
    return told(bodies.ExternalUrls(urls=urls, expires=expires_at.isoformat()))


# ---- Copies ----------------------------------------------------------------------------------------------------------


@post("/copy_weights", guards=[_TRAIN], status_code=HTTPStatus.OK)
async def copy_weights(request: AnyRequest) -> Response[bytes]:
    """Copies a checkpoint, one's own or one that is shown to all, to a run that holds it and cannot be trained on."""
    asked = await read(request, bodies.CopyWeights)
    if asked.weights_access_token is not None or _TOKEN_HEADER in request.headers:
        raise UnsupportedFieldError(
            "weights_access_token: copying with another account's token is not offered; a published checkpoint can be "
            "copied without",
            param="weights_access_token",
        )
    services, principal = services_of(request), principal_of(request)
    path = await river_path(services, asked.source_path, principal.tenant_id, field="source_path")
    await _readable(services, path, asked.source_path, principal.tenant_id)
    session_id, number = await _destination(request, services, principal, asked)
    model = model_id(session_id, number)
    place = Place(session_id, run_id_of(model, principal.tenant_id), number)
    try:
        copied = await sharing.copy_checkpoint(
            services,
            principal,
            path=path,
            place=place,
            ttl_s=asked.ttl_seconds,
            by=_actor(request),
        )
    except ConflictError:
        raise ConflictError(
            f"model_seq_id: {number} is of another run of this session already",
            param="model_seq_id",
        ) from None
    return told(bodies.Copied(tinker_path=of_river(copied.path, model)))


async def _destination(
    request: AnyRequest, services: Services, principal: Principal, asked: bodies.CopyWeights
) -> tuple[str, int]:
    """The session that a copy goes to, and the number of its run there: the session is new for a project."""
    if asked.session_id is not None and asked.model_seq_id is not None:
        validation.in_range(asked.model_seq_id, "model_seq_id", 0, SEQ_MAX)
        await catalog.check_open_session(
            services.pool, session_id=asked.session_id, tenant_id=principal.tenant_id
        )
        return asked.session_id, asked.model_seq_id
    if asked.destination_project_id is None:
        raise InvalidFieldError(
            "destination_project_id: missing, or session_id with model_seq_id",
            param="destination_project_id",
        )
    validation.ttl_s(asked.ttl_seconds)
    session_id = idempotent_id("ses", principal.tenant_id, identity_of(request))
    await catalog.insert_session(
        services.pool,
        session_id=session_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        tags={"copied": asked.source_path[:200]},
    )
    project_id = validation.name(asked.destination_project_id, "destination_project_id")
    tenant_id = principal.tenant_id
    await session_list.describe_session(
        services.pool, session_id=session_id, tenant_id=tenant_id, project_id=project_id
    )
    await catalog.end_session(services.pool, session_id=session_id, tenant_id=tenant_id)
    return session_id, 0


RUN_HANDLERS: list[Any] = cast(
    "list[Any]",
    [
        get_training_runs,
        get_training_run,
        weights_info,
        get_run_checkpoints,
        get_checkpoints,
        delete_checkpoint,
        publish_checkpoint,
        unpublish_checkpoint,
        put_checkpoint_ttl,
        get_external_weights_urls,
        copy_weights,
    ],
)
