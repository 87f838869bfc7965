"""Finding what requests name: runs, their names, and checkpoints of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.dialects.tinker.ids import TinkerPath, parse_path, run_id_of
from river_gateway.errors import NotFoundError

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


def river_path(text: str, tenant_id: str, *, field: str = "path") -> str:
    """What River calls the checkpoint of a path.

    Raises:
        InvalidFieldError: it is no path of a checkpoint.
        NotFoundError: it is one of nothing that could be a run.
    """
    path: TinkerPath = parse_path(text, field=field)
    return path.river(run_id_of(path.model, tenant_id))
