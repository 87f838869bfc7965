"""Finding what requests name: runs and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.dialects.tinker.ids import TinkerPath, model_parts, parse_path, run_id_of
from river_gateway.errors import NotFoundError
from river_gateway.training import session_list

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.services import Services


async def find_run(services: Services, model: str, tenant_id: str) -> RunRow:
    """The run that clients call `model`.

    Raises:
        NotFoundError: there is none, or it is another tenant's.
    """
    try:
        return await services.runs.find(run_id_of(model, tenant_id), tenant_id)
    except NotFoundError:
        raise NotFoundError(f"there is no training run {model!r}", param="model_id") from None


async def river_path(services: Services, text: str, tenant_id: str, *, field: str = "path") -> str:
    """What River calls the checkpoint of a path, be it one's own or one that its owner shows to all.

    Raises:
        InvalidFieldError: it is no path of a checkpoint.
        NotFoundError: it is one of nothing that could be a run.
    """
    path = parse_path(text, field=field)
    run_id = run_id_of(path.model, tenant_id)
    try:
        await services.runs.find(run_id, tenant_id)
    except NotFoundError:
        return await _path_of_another(services, path, tenant_id) or path.river(run_id)
    return path.river(run_id)


async def _path_of_another(services: Services, path: TinkerPath, tenant_id: str) -> str | None:
    """The path of what another tenant shows to all; what it does not show is not even named."""
    parts = model_parts(path.model)
    if parts is None:
        return None
    session_id, number = parts
    run_id = await session_list.find_run_of_session(
        services.pool, session_id=session_id, model_seq_id=number
    )
    if run_id is None:
        return None
    try:
        await services.names.checkpoint(path.river(run_id), tenant_id)
    except NotFoundError:
        return None
    return path.river(run_id)
