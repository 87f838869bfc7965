"""The training API under `/river/v1`: adapters that PEFT made elsewhere become checkpoints.

An upload is a form with two files, `config` and `weights`, and is gathered on disk. What comes of it is a checkpoint
like any other, of a run that is not in training: sampled, chatted with, downloaded, started from without optimizer.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from litestar import Response, post
from litestar.datastructures import UploadFile

from river_billing.catalog import record_checkpoint
from river_billing.events import CheckpointSaved
from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.files import disk_errors, store_errors
from river_gateway.checkpoints.peft_import import CONFIG_FILE, WEIGHTS_FILE, ImportPlan, plan_import
from river_gateway.checkpoints.safetensors_file import read_header, write_tensors
from river_gateway.codec import WireRequest, idempotency_key, reply
from river_gateway.errors import (
    InvalidFieldError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from river_gateway.ids import checkpoint_id, idempotent_id, seed_of
from river_gateway.limits import IMPORT_CONFIG_MAX_BYTES, IMPORT_MAX_BYTES
from river_gateway.services import Services, services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import validation
from river_gateway.training.opening import rank_max
from river_trainer.store import FileSets

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from litestar.datastructures import FormMultiDict

    from river_gateway.tenancy.auth import Principal


@post(
    "/checkpoints/import",
    guards=[requires("train")],
    status_code=HTTPStatus.CREATED,
    request_max_body_size=IMPORT_MAX_BYTES,
)
async def import_checkpoint(
    request: WireRequest, base_model: str, name: str, ttl_s: int | None = None
) -> Response[wire.Checkpoint]:
    """Makes a checkpoint of an adapter's files, sent as the form's `config` and `weights`."""
    services, principal = services_of(request), principal_of(request)
    validation.name(name, "name")
    validation.ttl_s(ttl_s)
    context_length = _context_length(services, base_model)
    run_id = idempotent_id("run", principal.tenant_id, idempotency_key(request))
    identity = checkpoint_id(f"{run_id}-import")
    folder = f"checkpoints/{identity}"
    async with _uploads(request) as form, services.imports:
        config, weights = await _config(form), _upload(form, "weights").file
        plan = await asyncio.to_thread(_plan, config, weights, base_model)
        lora = _lora(services, plan, base_model, run_id)
        with store_errors(), disk_errors():
            store = FileSets(_store_url(services), create=False)
            size_bytes = await asyncio.to_thread(_write, store, folder, plan)
    now = time.time()
    saved = CheckpointSaved(
        checkpoint_id=identity,
        run_id=run_id,
        tenant_id=principal.tenant_id,
        base_model=base_model,
        name=name,
        mode="inference",
        step=0,
        location=store.location(folder),
        size_bytes=size_bytes,
        created_at=now,
        expires_at=None if ttl_s is None else now + ttl_s,
    )
    await _record(services, principal, saved, lora, context_length)
    return reply(request, catalog.saved_checkpoint(saved), status=HTTPStatus.CREATED)


def _context_length(services: Services, base_model: str) -> int:
    """Of a base model that can be trained or served here."""
    known = [services.trainers.last_of(base_model), services.engines.last_of(base_model)]
    lengths = [record.context_length for record in known if record is not None]
    if lengths:
        return min(lengths)
    if not services.registered:
        raise UnavailableError("the registry of base models is being read; try again")
    raise NotFoundError(f"there is no base model {base_model!r}", param="base_model")


def _store_url(services: Services) -> str:
    url = services.settings.store_url
    if url is None:
        raise UnavailableError("this gateway has no checkpoint store: RIVER_STORE_URL is not set")
    return url


# ---- Upload ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _uploads(request: WireRequest) -> AsyncGenerator[FormMultiDict]:
    """The form of a request, whose files go away at the end."""
    with disk_errors():
        form = await request.form()
    try:
        yield form
    finally:
        await form.close()


def _upload(form: FormMultiDict, field: str) -> UploadFile:
    files = form.getall(field, [])
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise InvalidFieldError(f"{field}: the form must have one file of this name", param=field)
    return files[0]


async def _config(form: FormMultiDict) -> bytes:
    config = await _upload(form, "config").read(IMPORT_CONFIG_MAX_BYTES + 1)
    if len(config) > IMPORT_CONFIG_MAX_BYTES:
        raise TooLargeError(f"config: over {IMPORT_CONFIG_MAX_BYTES} bytes", param="config")
    return config


# ---- Conversion ------------------------------------------------------------------------------------------------------


def _plan(config: bytes, weights: IO[bytes], base_model: str) -> ImportPlan:
    size_bytes = weights.seek(0, os.SEEK_END)
    places = read_header(weights, size_bytes, WEIGHTS_FILE)
    return plan_import(config, places, weights, base_model=base_model)


def _lora(services: Services, plan: ImportPlan, base_model: str, run_id: str) -> wire.LoraConfig:
    """The shape, which must be one that the base's trainers and engines can hold."""
    shape = plan.shape
    lora = wire.LoraConfig(
        rank=shape.rank,
        alpha=shape.alpha,
        seed=seed_of(run_id),
        train_attn=shape.train_attn,
        train_mlp=shape.train_mlp,
        train_unembed=shape.train_unembed,
        expert_layout="per_expert",
    )
    validation.adapter_shape(lora, rank_max(services, base_model), default_seed=0)
    return lora


def _write(store: FileSets, folder: str, plan: ImportPlan) -> int:
    with tempfile.NamedTemporaryFile(prefix="river-import-") as file:
        write_tensors(file, plan.tensors)
        file.flush()
        files = {CONFIG_FILE: plan.config, WEIGHTS_FILE: Path(file.name)}
        return store.write(folder, files, {"imported": True})


# ---- Catalog ---------------------------------------------------------------------------------------------------------


async def _record(
    services: Services,
    principal: Principal,
    saved: CheckpointSaved,
    lora: wire.LoraConfig,
    context_length: int,
) -> None:
    """Writes down the checkpoint and the run that it hangs on; again is a no-op."""
    tenant_id = principal.tenant_id
    session_id = idempotent_id("ses", tenant_id, saved.run_id)
    async with services.pool.acquire() as connection, connection.transaction():
        await catalog.insert_session(
            connection,
            session_id=session_id,
            tenant_id=tenant_id,
            key_id=principal.key_id,
            tags={"imported": saved.name},
        )
        await catalog.end_session(connection, session_id=session_id, tenant_id=tenant_id)
        await catalog.insert_run(
            connection,
            run_id=saved.run_id,
            tenant_id=tenant_id,
            session_id=session_id,
            base_model=saved.base_model,
            lora=lora,
            context_length=context_length,
            imported=True,
        )
        await record_checkpoint(connection, saved)


IMPORT_HANDLERS: list[Any] = [import_checkpoint]
