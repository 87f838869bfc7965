"""The routes about an account: what was used and is stored, who changed what, and the key that asks."""

from __future__ import annotations

import datetime as dt
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from litestar import Response, delete, get

from river_billing import exports
from river_billing import limits as billing_limits
from river_billing.errors import ExportError
from river_billing.events import UsageKind
from river_billing.prices import list_prices
from river_client.wire import NANO_USD_PER_USD
from river_gateway.context import context_of
from river_gateway.dialects.tinker import rest_bodies as bodies
from river_gateway.dialects.tinker.http import AnyRequest, told
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import AUDIT_PAGE_ROWS_MAX
from river_gateway.services import services_of
from river_gateway.tenancy import administration, audit
from river_gateway.tenancy.accounts import parse_time
from river_gateway.tenancy.auth import principal_of, requires

if TYPE_CHECKING:
    from river_client.usage_wire import UsageRow
    from river_gateway.database import Database, Row
    from river_gateway.services import Services

_SCOPES = requires("train", "infer", "admin")
_AUDITORS = requires("train", "admin")
_DAYS_MAX = 14
_HOUR = dt.timedelta(hours=1)
_KILOBYTES_PER_GIGABYTE = 1_000_000
_HOURS_PER_MONTH = 730
_RUN_SESSIONS = """
select r.run_id, s.session_id, s.project_id, s.user_metadata
from run r join session s using (session_id) where r.run_id = any($1) and r.tenant_id = $2
"""
_KEY_NAMES = "select key_id, name from api_key where tenant_id = $1"
_KEY = """
select k.name, t.name as tenant_name from api_key k join tenant t using (tenant_id) where k.key_id = $1
"""
_STORED = """
select s.project_id, k.name as key_name, c.base_model, r.context_length, count(*) as checkpoints,
       sum(c.size_bytes)::bigint as size_bytes
from checkpoint c join run r using (run_id) join session s on s.session_id = r.session_id
join api_key k on k.key_id = s.key_id
where c.tenant_id = $1 and c.deleted_at is null and (c.expires_at is null or c.expires_at > now())
  and ($2::text is null or s.project_id = $2)
group by 1, 2, 3, 4 order by 1, 2, 3, 4
"""


# ---- Usage -----------------------------------------------------------------------------------------------------------


@get("/billing/usage/events", guards=[_SCOPES])
async def get_usage_events(
    request: AnyRequest, starting_on: str | None = None, ending_before: str | None = None
) -> Response[bytes]:
    """What was used in each hour, by key, model, session and kind; the last day unless told otherwise."""
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    now = dt.datetime.now(dt.UTC)
    end = _hour(ending_before, "ending_before") or _floor(now) + _HOUR
    begin = _hour(starting_on, "starting_on") or end - dt.timedelta(days=1)
    if not begin < end <= begin + dt.timedelta(days=_DAYS_MAX):
        raise InvalidFieldError(
            f"ending_before: {end.isoformat()}, must be after starting_on and at most {_DAYS_MAX} days",
            param="ending_before",
        )
    rows = await _usage(services, tenant_id, begin, end)
    sessions = await services.pool.fetch(
        _RUN_SESSIONS, list({row.run for row in rows if row.run is not None}), tenant_id
    )
    keys = await services.pool.fetch(_KEY_NAMES, tenant_id)
    names = {row["key_id"]: row["name"] for row in keys}
    by_run = {row["run_id"]: row for row in sessions}
    return told(
        bodies.Usage(
            data=[_event(row, by_run, names) for row in rows if row.quantity],
            sessions={
                row["session_id"]: bodies.UsageSession(user_metadata=_metadata(row))
                for row in sessions
            },
            cost_data_through=min(now, end).isoformat(),
        )
    )


async def _usage(
    services: Services, tenant_id: str, begin: dt.datetime, end: dt.datetime
) -> list[UsageRow]:
    rows: list[UsageRow] = []
    after: str | None = None
    try:
        query = exports.usage_query(
            tenant_id=tenant_id,
            since=begin,
            until=end,
            every="hour",
            group=["model", "key", "run"],
        )
        while True:
            async with services.pool.acquire() as connection:
                page = await exports.usage_page(
                    connection, query, after=after, rows_max=billing_limits.EXPORT_ROWS_MAX
                )
            rows += page.rows
            after = page.next
            if after is None:
                return rows
    except ExportError as error:
        raise InvalidFieldError(f"starting_on: {error}", param="starting_on") from None


def _hour(text: str | None, field: str) -> dt.datetime | None:
    if text is None:
        return None
    moment = parse_time(text, field)
    if moment != _floor(moment):
        raise InvalidFieldError(f"{field}: {text!r} is not at the start of an hour", param=field)
    return moment


def _floor(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.UTC).replace(minute=0, second=0, microsecond=0)


def _event(row: UsageRow, by_run: dict[str, Row], key_names: dict[str, str]) -> bodies.UsageEvent:
    begin = dt.datetime.fromisoformat(row.period)
    session = by_run.get(row.run or "")
    cost_usd = row.amount_nano_usd / NANO_USD_PER_USD
    is_stored = row.kind == UsageKind.STORAGE
    rate = cost_usd / row.quantity * _KILOBYTES_PER_GIGABYTE
    return bodies.UsageEvent(
        bucket_start=begin.isoformat(),
        bucket_end=(begin + _HOUR).isoformat(),
        base_model=row.model,
        user_id=row.key,
        user_name=key_names.get(row.key or ""),
        session_id=session["session_id"] if session else None,
        project_id=session["project_id"] if session else None,
        estimated_cost_usd=cost_usd,
        effective_rate_usd_per_million_tokens=None if is_stored else rate,
        effective_rate_usd_per_gigabyte_month=rate * _HOURS_PER_MONTH if is_stored else None,
        event_info=_info(row),
    )


def _info(row: UsageRow) -> dict[str, Any]:
    """What was used, as clients tell it apart."""
    match UsageKind(row.kind):
        case UsageKind.TRAINING:
            return {"type": "training", "token_count": row.quantity}
        case UsageKind.PROMPT:
            return {"type": "sampling_prefill", "cached": False, "token_count": row.quantity}
        case UsageKind.CACHED_PROMPT:
            return {"type": "sampling_prefill", "cached": True, "token_count": row.quantity}
        case UsageKind.COMPLETION:
            return {"type": "sampling_sample", "token_count": row.quantity}
        case UsageKind.STORAGE:
            hours = row.quantity / _KILOBYTES_PER_GIGABYTE
            free = row.amount_nano_usd == 0
            return {"type": "storage", "free": free, "gigabyte_hours": hours}


def _metadata(row: Row) -> dict[str, str]:
    return msgspec.json.decode(row["user_metadata"], type=dict[str, str])


@get("/billing/usage/checkpoints/current", guards=[_SCOPES])
async def get_stored(request: AnyRequest, project_id: str | None = None) -> Response[bytes]:
    """What is stored at the moment, by project and key, and what a month of it costs."""
    pool, tenant_id = services_of(request).pool, principal_of(request).tenant_id
    rows = await pool.fetch(_STORED, tenant_id, project_id)
    async with pool.acquire() as connection:
        prices = await list_prices(connection)
    rates = {
        (price.model, price.context_length): float(price.usd_per_million)
        for price in prices
        if price.kind == UsageKind.STORAGE and price.valid_to is None
    }
    uses: dict[tuple[str | None, str], list[float]] = {}
    for row in rows:
        use = uses.setdefault((row["project_id"], row["key_name"]), [0, 0, 0.0])
        use[0] += row["checkpoints"]
        use[1] += row["size_bytes"]
        rate = rates.get((row["base_model"], row["context_length"]), 0.0)
        use[2] += rate * row["size_bytes"] / 1e9
    stored = sum(use[1] for use in uses.values())
    return told(
        bodies.StorageUses(
            data=[
                bodies.StorageUse(
                    project_id=project,
                    user_name=name,
                    checkpoint_count=int(count),
                    size_bytes=int(size),
                    size_gigabytes=size / 1e9,
                    estimated_monthly_cost_usd=cost,
                )
                for (project, name), (count, size, cost) in uses.items()
            ],
            effective_rate_usd_per_gigabyte_month=(
                sum(use[2] for use in uses.values()) / stored * 1e9 if stored else None
            ),
        )
    )


# ---- Audit -----------------------------------------------------------------------------------------------------------


@get("/audit", guards=[_AUDITORS])
async def get_audit(
    request: AnyRequest,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: str | None = None,
) -> Response[bytes]:
    """Who changed what of the tenant's on a day (UTC), today unless told otherwise; oldest first."""
    if event_type not in ("all", "checkpoints"):
        return told(bodies.Audit(entries=[]))  # There are none of these, so nobody has changed one.
    entries = await audit.read(
        services_of(request).pool,
        principal_of(request).tenant_id,
        day=audit.parse_day(day) if day else dt.datetime.now(dt.UTC).date(),
        action=None if event_type == "all" else event_type,
        count_max=AUDIT_PAGE_ROWS_MAX,
    )
    return told(
        bodies.Audit(
            entries=[
                bodies.AuditEntry(
                    timestamp=entry.occurred_at,
                    event=entry.action,
                    event_details=entry.details
                    | {"subject": entry.subject, "key_id": entry.key_id, "through": entry.through},
                )
                for entry in reversed(entries)
            ]
        )
    )


# ---- The key that asks -----------------------------------------------------------------------------------------------


@get("/auth/apikey/me", guards=[_SCOPES])
async def get_own_key(request: AnyRequest) -> Response[bytes]:
    """What is known of the key of this request."""
    principal = principal_of(request)
    row = await _key(services_of(request).pool, principal.key_id)
    details = {"org_details": {"name": row["tenant_name"]}, "user_details": {"email": row["name"]}}
    return told(
        bodies.KeyInfo(
            key_id=_number_of(principal.key_id), name=row["name"], note="", details=details
        )
    )


async def _key(database: Database, key_id: str) -> Row:
    row = await database.fetchrow(_KEY, key_id)
    assert row is not None, "a key that has been let in is there"
    return row


def _number_of(key_id: str) -> int:
    """Clients take the ids of keys to be numbers: the first bits of ours."""
    return int(key_id.rpartition("_")[2][:12], 16)


@delete("/auth/apikey/me", guards=[_SCOPES], status_code=HTTPStatus.NO_CONTENT)
async def delete_own_key(request: AnyRequest) -> None:
    """Ends the key of this request, for good and everywhere."""
    principal = principal_of(request)
    by = audit.actor(principal, context_of(request.scope).request_id, "tinker")
    await administration.revoke_key(services_of(request), by, principal.key_id)


ACCOUNT_HANDLERS: list[Any] = [
    get_usage_events,
    get_stored,
    get_audit,
    get_own_key,
    delete_own_key,
]
