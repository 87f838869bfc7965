"""The list of runs, and the page of one: its curves, configuration, checkpoints and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get
from litestar.response import ServerSentEvent

from river_gateway.dashboard import runs
from river_gateway.dashboard.pages import Page, follow, show
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.services import services_of
from river_gateway.training import samples

if TYPE_CHECKING:
    from river_gateway.dashboard.viewer import Viewer

_LIST_PAGE = Page("runs.html", {"runs": "parts/runs.html"})
_RUN_PAGE = Page("run.html", {"run": "parts/run.html"})


# ---- All of them -----------------------------------------------------------------------------------------------------


@get("/runs", include_in_schema=False)
async def runs_page(request: Request[Any, Any, Any]) -> Response[str]:
    """The list, newest first, with search."""
    viewer = await viewer_of(request)
    return show(_LIST_PAGE, request, viewer, await _read_list(request, viewer))


@get("/runs/live", include_in_schema=False)
async def runs_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Its changes."""
    viewer = await viewer_of(request)
    return follow(_LIST_PAGE, request, viewer, lambda: _read_list(request, viewer))


async def _read_list(request: Request[Any, Any, Any], viewer: Viewer) -> dict[str, Any]:
    asked = {
        name: request.query_params.get(name, "")
        for name in ("search", "status", "tenant", "before")
    }
    pool, before = services_of(request).pool, asked.pop("before")
    found = await runs.list_runs(
        pool,
        viewer.tenant_id,
        search=asked["search"],
        status=asked["status"],
        before=await runs.find_run(pool, viewer.tenant_id, before) if before else None,
    )
    more = found[-1].run_id if len(found) == runs.PAGE_RUNS else None
    return {"runs": found, "statuses": runs.STATUSES, "more": more, **asked}


# ---- One -------------------------------------------------------------------------------------------------------------


@get("/runs/{run_id:str}", include_in_schema=False)
async def run_page(request: Request[Any, Any, Any], run_id: str) -> Response[str]:
    """One run; `?with=` lays the curves of others over its own."""
    viewer = await viewer_of(request)
    values = await _read_run(request, viewer, run_id)
    pool = services_of(request).pool
    others = [
        await runs.find_run(pool, viewer.tenant_id, other)
        for other in request.query_params.getall("with", [])[: runs.RUN_OVERLAYS_MAX]
        if other != run_id
    ]
    newest = await runs.list_runs(pool, viewer.tenant_id)
    candidates = {run.run_id: run for run in (*others, *newest) if run.run_id != run_id}
    overlays = {"others": others, "candidates": list(candidates.values())}
    return show(_RUN_PAGE, request, viewer, {**values, **overlays})


@get("/runs/{run_id:str}/live", include_in_schema=False)
async def run_live(request: Request[Any, Any, Any], run_id: str) -> ServerSentEvent:
    """Its changes."""
    viewer = await viewer_of(request)
    await runs.find_run(services_of(request).pool, viewer.tenant_id, run_id)
    return follow(_RUN_PAGE, request, viewer, lambda: _read_run(request, viewer, run_id))


@get("/runs/{run_id:str}/series", include_in_schema=False)
async def get_series(request: Request[Any, Any, Any], run_id: str, after: int = -1) -> runs.Series:
    """Its metrics after a step, in columns."""
    viewer = await viewer_of(request)
    pool = services_of(request).pool
    run = await runs.find_run(pool, viewer.tenant_id, run_id)
    return await runs.run_series(pool, run, after_step=after)


async def _read_run(request: Request[Any, Any, Any], viewer: Viewer, run_id: str) -> dict[str, Any]:
    pool = services_of(request).pool
    run = await runs.find_run(pool, viewer.tenant_id, run_id)
    return {
        "run": run,
        "cost": await runs.run_cost(pool, run),
        "checkpoints": await runs.run_checkpoints(pool, run),
        "sampled": await samples.summary(pool, run.run_id),
    }
