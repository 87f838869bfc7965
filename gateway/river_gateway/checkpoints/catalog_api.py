"""The training API under `/river/v1`: checkpoints and their files, models, prices."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from litestar import Response, delete, get, patch
from litestar.params import Parameter
from litestar.response import Stream

from river_billing.prices import list_prices
from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.files import (
    ByteRange,
    find_file,
    list_files,
    parse_range,
    read_file,
)
from river_gateway.checkpoints.lifetime import set_ttl
from river_gateway.checkpoints.removal import remove_checkpoint
from river_gateway.codec import WireRequest, reply
from river_gateway.context import context_of
from river_gateway.services import Services, services_of
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires

_EITHER = [requires("train", "infer")]


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@get("/checkpoints", guards=_EITHER)
async def get_checkpoints(request: WireRequest, path: str | None = None) -> Response[wire.Page]:
    """The tenant's live checkpoints, newest first, or the one of `path`."""
    pool, tenant_id = services_of(request).pool, principal_of(request).tenant_id
    if path is None:
        rows = await catalog.list_checkpoints(pool, tenant_id)
    else:
        rows = [await catalog.find_checkpoint(pool, path=path, tenant_id=tenant_id)]
    return reply(request, wire.Page(checkpoints=[row.checkpoint for row in rows]))


@patch("/checkpoints", guards=[requires("train")])
async def change_checkpoint(
    request: WireRequest, path: str, data: wire.ChangeTtl
) -> Response[wire.Checkpoint]:
    """Changes for how long a checkpoint is kept, from now on."""
    changed = await set_ttl(
        services_of(request),
        tenant_id=principal_of(request).tenant_id,
        path=path,
        ttl_s=data.ttl_s,
        by=actor_of(request),
    )
    return reply(request, changed)


@delete("/checkpoints", guards=[requires("train")], status_code=HTTPStatus.NO_CONTENT)
async def delete_checkpoint(request: WireRequest, path: str) -> None:
    """Deletes a checkpoint and its files; again is a no-op. An engine that holds it may go on until it lets go."""
    await remove_checkpoint(
        services_of(request),
        path=path,
        tenant_id=principal_of(request).tenant_id,
        log_ids=context_of(request.scope).log_ids(),
        by=actor_of(request),
    )


@get("/checkpoints/files", guards=_EITHER)
async def get_checkpoint_files(request: WireRequest, path: str) -> Response[wire.Page]:
    """The files of a checkpoint."""
    row = await catalog.find_checkpoint(
        services_of(request).pool, path=path, tenant_id=principal_of(request).tenant_id
    )
    return reply(request, wire.Page(files=await list_files(row.location)))


@get("/checkpoints/file", guards=_EITHER, media_type="application/octet-stream")
async def get_checkpoint_file(
    request: WireRequest,
    path: str,
    name: str,
    byte_range: Annotated[str | None, Parameter(header="Range", required=False)] = None,
) -> Stream:
    """A file of a checkpoint, or a part of it, for downloads that can be resumed."""
    row = await catalog.find_checkpoint(
        services_of(request).pool, path=path, tenant_id=principal_of(request).tenant_id
    )
    return await file_answer(row.location, name, byte_range)


async def file_answer(location: str, name: str, byte_range: str | None) -> Stream:
    """A file of a folder, or the part of it that a `Range` asks for."""
    file = await find_file(location, name)
    part = ByteRange(0, file.size_bytes, file.size_bytes)
    headers = {"accept-ranges": "bytes"}
    if byte_range is not None:
        part = parse_range(byte_range, file.size_bytes)
        headers["content-range"] = part.content_range
    headers["content-length"] = str(part.end - part.start)
    return Stream(
        read_file(location, file.name, part),
        status_code=HTTPStatus.OK if byte_range is None else HTTPStatus.PARTIAL_CONTENT,
        media_type="application/octet-stream",
        headers=headers,
    )


# ---- Models, prices --------------------------------------------------------------------------------------------------


@get("/models", guards=_EITHER)
async def get_models(request: WireRequest) -> Response[wire.Page]:
    """The base models, with what they can take and whether they can be trained and served at the moment."""
    services = services_of(request)
    names = sorted(services.engines.bases() | services.trainers.bases())
    return reply(request, wire.Page(models=[_base_model(services, name) for name in names]))


def _base_model(services: Services, name: str) -> wire.BaseModel:
    known = [
        record
        for record in (services.engines.last_of(name), services.trainers.last_of(name))
        if record is not None
    ]
    assert known
    return wire.BaseModel(
        name=name,
        context_length=min(record.context_length for record in known),
        vocab_size=known[0].vocab_size,
        max_lora_rank=min(record.max_lora_rank for record in known),
        trainable=bool(services.trainers.alive(name)),
        servable=bool(services.engines.alive(name)),
    )


@get("/prices", guards=[requires("train", "infer", "admin")])
async def get_prices(request: WireRequest) -> Response[wire.Page]:
    """Every price that is or was in force."""
    async with services_of(request).pool.acquire() as connection:
        prices = await list_prices(connection)
    return reply(request, wire.Page(prices=prices))


CATALOG_HANDLERS: list[Any] = [
    get_checkpoints,
    change_checkpoint,
    delete_checkpoint,
    get_checkpoint_files,
    get_checkpoint_file,
    get_models,
    get_prices,
]
