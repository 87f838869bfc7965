"""The routes about sessions: lists, searching, how they ended, and which project they belong to."""

from __future__ import annotations

import datetime as dt
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Response, get, post, put

from river_gateway.dialects.tinker import listing, samplers
from river_gateway.dialects.tinker import rest_bodies as bodies
from river_gateway.dialects.tinker.http import AnyRequest, read, told
from river_gateway.dialects.tinker.ids import run_name
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import TAG_MAX_CHARS
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import session_list, validation
from river_gateway.training.session_list import After, Wanted

if TYPE_CHECKING:
    from river_gateway.training.session_list import SessionRow, Status

_SCOPES = requires("train", "infer")
_NO_PROJECT = "default"
"""What clients are told of a session that was put into no project: they know of none without."""


@get("/sessions", guards=[_SCOPES])
async def get_sessions(request: AnyRequest, limit: int = 20, offset: int = 0) -> Response[bytes]:
    """The ids of one's sessions, newest first."""
    offset, limit = listing.page(offset, limit)
    found = await session_list.search_sessions(
        services_of(request).pool,
        principal_of(request).tenant_id,
        Wanted(),
        limit=limit,
        offset=offset,
    )
    return told(bodies.SessionIds(sessions=[row.session_id for row in found]))


@get("/sessions/{session_id:str}", guards=[_SCOPES])
async def get_session(request: AnyRequest, session_id: str) -> Response[bytes]:
    """What a session holds."""
    pool, tenant_id = services_of(request).pool, principal_of(request).tenant_id
    known = {"session_id": session_id, "tenant_id": tenant_id}
    found = await session_list.find_session(pool, **known)
    runs = await session_list.runs_of_session(pool, **known)
    return told(
        bodies.SessionInfo(
            training_run_ids=[run_name(run_id, session_id, number) for run_id, number in runs],
            sampler_ids=await samplers.of_session(pool, session_id, tenant_id),
            user_metadata=found.user_metadata,
            display_name=found.display_name,
        )
    )


@post("/sessions/search", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def search_sessions(request: AnyRequest) -> Response[bytes]:
    """One's sessions that fit, newest first, a page at a time."""
    asked = await read(request, bodies.SearchSessions)
    principal = principal_of(request)
    after = None
    if asked.cursor is not None:
        moment = asked.cursor.last_created_at
        after = After(
            moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC), asked.cursor.last_session_id
        )
    wanted = Wanted(
        session_id=asked.session_id,
        user_metadata=asked.user_metadata,
        display_name=asked.display_name,
        project_ids=asked.project_ids,
        key_ids=_owners(asked.owner, principal.key_id),
        statuses=_statuses(asked.statuses),
    )
    found = await session_list.search_sessions(
        services_of(request).pool, principal.tenant_id, wanted, limit=asked.limit, after=after
    )
    cursor = None
    if len(found) == asked.limit:
        cursor = bodies.SearchCursor(
            last_created_at=found[-1].created_at, last_session_id=found[-1].session_id
        )
    return told(bodies.FoundSessions(sessions=[_found(row) for row in found], next_cursor=cursor))


def _owners(owner: bodies.Owner, key_id: str) -> list[str] | None:
    """The keys whose sessions are wanted; all of the tenant's can be seen by each of them."""
    match owner.type:
        case "own":
            return [key_id]
        case "accessible":
            return None
        case "user":
            if not owner.owner_urns:
                raise InvalidFieldError("owner.owner_urns: missing", param="owner.owner_urns")
            return owner.owner_urns


def _statuses(queries: list[bodies.StatusQuery] | None) -> list[Status] | None:
    """What clients call `cancelled` is a session that nobody ended; none has failed: only what runs in it does."""
    if queries is None:
        return None
    wanted: list[Status] = []
    for query in queries:
        match query.type:
            case "active":
                wanted.append("active")
            case "cancelled":
                wanted.append("silent")
            case "client_finished":
                wanted += query.reasons or ["success", "errored", "interrupted"]
            case "failed":
                pass
    return wanted


def _found(row: SessionRow) -> bodies.FoundSession:
    return bodies.FoundSession(
        session_id=row.session_id,
        created_at=row.created_at.isoformat(),
        owner=row.key_id,
        project_id=row.project_id or _NO_PROJECT,
        status=_status(row),
        checkpoints_count=row.checkpoints,
        checkpoint_storage_bytes=row.size_bytes,
        user_metadata=row.user_metadata,
        display_name=row.display_name,
    )


def _status(row: SessionRow) -> dict[str, Any]:
    match row.status:
        case "active":
            return {"type": "active"}
        case "silent":
            heard = f"its client was last heard of at {row.heartbeat_at.isoformat()}"
            return {"type": "cancelled", "detail": heard}
        case reason:
            return {
                "type": "client_finished",
                "reason": {"type": reason},
                "detail": row.end_detail,
            }


@post("/sessions/{session_id:str}/finish", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def finish_session(request: AnyRequest, session_id: str) -> Response[bytes]:
    """Ends a session, and says why."""
    asked = await read(request, bodies.FinishSession)
    detail = asked.detail
    if detail is not None and len(detail) > TAG_MAX_CHARS:
        raise InvalidFieldError(f"detail: at most {TAG_MAX_CHARS} characters", param="detail")
    await session_list.finish_session(
        services_of(request).pool,
        session_id=session_id,
        tenant_id=principal_of(request).tenant_id,
        reason=asked.reason.type,
        detail=detail,
    )
    return Response(b"{}", media_type="application/json")


@put("/sessions/{session_id:str}/project", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def put_session_project(request: AnyRequest, session_id: str) -> Response[bytes]:
    """Puts a session into a project: a name of one's own, by which sessions, runs and usage are told apart."""
    asked = await read(request, bodies.SetProject)
    await session_list.describe_session(
        services_of(request).pool,
        session_id=session_id,
        tenant_id=principal_of(request).tenant_id,
        project_id=validation.name(asked.project_id, "project_id"),
    )
    return Response(b"{}", media_type="application/json")


@get("/sessions/{session_id:str}/trace_export", guards=[_SCOPES])
async def get_trace_export(request: AnyRequest, session_id: str) -> Response[bytes]:
    """There are no traces to export: they go to the operator's own collector, as they happen."""
    await session_list.find_session(
        services_of(request).pool,
        session_id=session_id,
        tenant_id=principal_of(request).tenant_id,
    )
    return told(
        bodies.TraceExport(
            status="failed",
            error="exporting a trace is not offered: this server sends traces to its operator's collector",
        )
    )


SESSION_LIST_HANDLERS: list[Any] = [
    get_sessions,
    get_session,
    search_sessions,
    finish_session,
    put_session_project,
    get_trace_export,
]
