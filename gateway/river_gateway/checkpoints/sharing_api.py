"""The training API under `/river/v1`: checkpoints shown to all, copied, and opened by signed URLs."""

from __future__ import annotations

import datetime as dt
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from litestar import Response, delete, get, post
from litestar.params import Parameter
from litestar.response import Stream

from river_client import wire
from river_client.wire import API_PREFIX
from river_gateway.checkpoints import catalog, sharing
from river_gateway.checkpoints.catalog_api import file_answer
from river_gateway.checkpoints.files import list_files
from river_gateway.checkpoints.sharing import Place
from river_gateway.checkpoints.signed_urls import ROUTE, find_location
from river_gateway.codec import WireRequest, idempotency_key, reply
from river_gateway.ids import idempotent_id
from river_gateway.limits import SIGNED_URL_S
from river_gateway.services import services_of
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires

if TYPE_CHECKING:
    from litestar import Request

    from river_gateway.checkpoints.catalog import CheckpointRow

_EITHER = [requires("train", "infer")]
_TRAIN = [requires("train")]


@post("/checkpoints/public", guards=_TRAIN, status_code=HTTPStatus.NO_CONTENT)
async def publish_checkpoint(request: WireRequest, path: str) -> None:
    """Lets every tenant load a checkpoint and sample from it, by its path."""
    tenant_id = principal_of(request).tenant_id
    await sharing.publish(
        services_of(request), tenant_id=tenant_id, path=path, by=actor_of(request)
    )


@delete("/checkpoints/public", guards=_TRAIN, status_code=HTTPStatus.NO_CONTENT)
async def unpublish_checkpoint(request: WireRequest, path: str) -> None:
    """Lets nobody else use a checkpoint from now on; copies of it stay."""
    tenant_id = principal_of(request).tenant_id
    await sharing.unpublish(
        services_of(request), tenant_id=tenant_id, path=path, by=actor_of(request)
    )


@post("/checkpoints/copy", guards=_TRAIN)
async def copy_checkpoint(
    request: WireRequest, data: wire.CopyCheckpoint
) -> Response[wire.Checkpoint]:
    """Copies one's own checkpoint, or one that is shown to all, to a run of its own, which cannot be trained on."""
    services, principal = services_of(request), principal_of(request)
    run_id = idempotent_id("run", principal.tenant_id, idempotency_key(request))
    # Whether there is anything to copy comes first, so that nothing is left behind if there is not.
    await catalog.find_checkpoint(
        services.pool, path=data.path, tenant_id=principal.tenant_id, public=True
    )
    session_id = idempotent_id("ses", principal.tenant_id, run_id)
    await catalog.insert_session(
        services.pool,
        session_id=session_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        tags={"copied": data.path},
    )
    await catalog.end_session(services.pool, session_id=session_id, tenant_id=principal.tenant_id)
    copied = await sharing.copy_checkpoint(
        services,
        principal,
        path=data.path,
        place=Place(session_id, run_id),
        ttl_s=data.ttl_s,
        by=actor_of(request),
    )
    return reply(request, copied, status=HTTPStatus.CREATED)


# ---- Signed URLs -----------------------------------------------------------------------------------------------------


@get("/checkpoints/urls", guards=_EITHER)
async def get_checkpoint_urls(request: WireRequest, path: str) -> Response[wire.SignedUrls]:
    """A URL for each file of a checkpoint, which opens it for an hour without a key."""
    row = await catalog.find_checkpoint(
        services_of(request).pool, path=path, tenant_id=principal_of(request).tenant_id
    )
    urls, expires_at = await signed_urls(request, row)
    return reply(request, wire.SignedUrls(urls=urls, expires_at=expires_at.isoformat()))


async def signed_urls(
    request: Request[Any, Any, Any], row: CheckpointRow
) -> tuple[dict[str, str], dt.datetime]:
    """A URL for each file of a checkpoint by name, and when they end: in an hour, or with the checkpoint."""
    services = services_of(request)
    ends_at = time.time() + SIGNED_URL_S
    if row.checkpoint.expires_at is not None:
        ends_at = min(ends_at, dt.datetime.fromisoformat(row.checkpoint.expires_at).timestamp())
    expires_at = int(ends_at)
    root = (services.settings.public_url or str(request.base_url)).rstrip("/") + API_PREFIX
    urls = {
        file.name: root
        + await services.url_signer.query(row.checkpoint.checkpoint_id, file.name, expires_at)
        for file in await list_files(row.location)
    }
    return urls, dt.datetime.fromtimestamp(expires_at, dt.UTC)


@get(
    f"{ROUTE}/{{checkpoint_id:str}}/{{name:str}}",
    media_type="application/octet-stream",
    include_in_schema=False,
)
async def get_signed_file(
    request: WireRequest,
    checkpoint_id: str,
    name: str,
    expires: int,
    signature: str,
    byte_range: Annotated[str | None, Parameter(header="Range", required=False)] = None,
) -> Stream:
    """A file, or a part of it, for who has its URL."""
    services = services_of(request)
    await services.url_signer.check(checkpoint_id, name, expires, signature)
    location = await find_location(services.pool, checkpoint_id)
    return await file_answer(location, name, byte_range)


SHARING_HANDLERS: list[Any] = [
    publish_checkpoint,
    unpublish_checkpoint,
    copy_checkpoint,
    get_checkpoint_urls,
    get_signed_file,
]
