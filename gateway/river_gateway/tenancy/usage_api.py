"""The training API under `/river/v1` for usage: sums, and usage over time as pages or CSV.

A tenant reads its own; a key with the scope `admin` reads anybody's (`?tenant=`, an id or name) or everybody's (`*`).
"""

from __future__ import annotations

from typing import Any, Literal, cast

from litestar import Response, get
from litestar.response import Stream

from river_billing import exports, limits
from river_billing.errors import ExportError
from river_billing.usage import usage_lines
from river_client import usage_wire, wire
from river_gateway.codec import WireRequest, reply
from river_gateway.database import Pool
from river_gateway.errors import InvalidFieldError, PermissionDeniedError
from river_gateway.services import services_of
from river_gateway.tenancy.accounts import find_tenant, parse_time
from river_gateway.tenancy.auth import principal_of, requires

ALL_TENANTS = "*"
CSV = "text/csv"
_ANY = [requires("train", "infer", "admin")]
_PAGE_ROWS_DEFAULT = 1000


async def tenant_asked(request: WireRequest, tenant: str | None) -> str | None:
    """Whose things a request is about: the caller's own, or for an admin anybody's, None being everybody's.

    Raises:
        PermissionDeniedError: the key may not ask about other tenants.
        NotFoundError: there is no such tenant.
    """
    principal = principal_of(request)
    if tenant is None or tenant == principal.tenant_id:
        return principal.tenant_id
    if "admin" not in principal.scopes:
        raise PermissionDeniedError("tenant: only an admin key may ask about other tenants")
    if tenant == ALL_TENANTS:
        return None
    return await find_tenant(services_of(request).pool, tenant)


@get("/usage", guards=_ANY)
async def get_usage(
    request: WireRequest,
    since: str | None = None,
    until: str | None = None,
    tenant: str | None = None,
) -> Response[wire.Page]:
    """What was used and what it cost, in whole hours."""
    tenant_id = await tenant_asked(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        lines = await usage_lines(
            connection,
            tenant_id=tenant_id,
            since=parse_time(since, "since") if since else None,
            until=parse_time(until, "until") if until else None,
        )
    return reply(request, wire.Page(usage=lines))


@get("/usage/series", guards=_ANY)
async def get_usage_series(
    request: WireRequest,
    every: str = "day",
    group: str = ",".join(usage_wire.DEFAULT_GROUP),
    since: str | None = None,
    until: str | None = None,
    tenant: str | None = None,
    after: str | None = None,
    limit: int = _PAGE_ROWS_DEFAULT,
    format: Literal["csv"] | None = None,  # noqa: A002 - its name in the URL
) -> Response[usage_wire.UsageSeries] | Stream:
    """Usage by hour or day and by what `group` names, a page at a time; as CSV (`format` or Accept) all of it."""
    if not 1 <= limit <= limits.EXPORT_ROWS_MAX:
        raise InvalidFieldError(
            f"limit: {limit}, must be 1 to {limits.EXPORT_ROWS_MAX}", param="limit"
        )
    pool = services_of(request).pool
    tenant_id = await tenant_asked(request, tenant)
    try:
        query = exports.usage_query(
            tenant_id=tenant_id,
            since=parse_time(since, "since") if since else None,
            until=parse_time(until, "until") if until else None,
            every=_every(every),
            group=_group(group),
        )
        if format == "csv" or CSV in request.headers.get("accept", ""):
            return csv_answer(pool, query)
        async with pool.acquire() as connection:
            page = await exports.usage_page(connection, query, after=after, rows_max=limit)
    except ExportError as error:
        message = str(error)
        raise InvalidFieldError(message, param=message.partition(":")[0]) from None
    return reply(request, page)


def csv_answer(pool: Pool, query: exports.UsageQuery) -> Stream:
    """All that a query finds, as a file."""
    return Stream(
        exports.usage_csv(pool.acquire, query),
        media_type=CSV,
        headers={"content-disposition": 'attachment; filename="usage.csv"'},
    )


def _every(text: str) -> usage_wire.Every:
    if text not in ("hour", "day"):
        raise InvalidFieldError(f"every: {text!r}, must be `hour` or `day`", param="every")
    return text


def _group(text: str) -> list[usage_wire.Dimension]:
    """The names of a list with commas, empty or not; the kind is always told apart."""
    names = [name.strip() for name in text.split(",")] if text else []
    for index, name in enumerate(names):
        if name != "kind" and name not in usage_wire.DIMENSIONS:
            known = ", ".join(usage_wire.DIMENSIONS)
            raise InvalidFieldError(
                f"group[{index}]: {name!r} is none of {known}", param=f"group[{index}]"
            )
    return cast("list[usage_wire.Dimension]", [name for name in names if name != "kind"])


USAGE_HANDLERS: list[Any] = [get_usage, get_usage_series]
