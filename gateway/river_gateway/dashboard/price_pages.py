"""Prices with their history, and discounts: for everybody to see, for admins to set from a moment on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast, get_args

from litestar import Request, Response, get, post

from river_billing.discounts import ANY_KIND, list_discounts
from river_billing.events import UsageKind
from river_billing.prices import KILOBYTES_PER_GIGABYTE, list_prices, per_unit
from river_client.price_wire import PricedKind, SetDiscount, SetPrice
from river_gateway.dashboard.forms import Typed, moment_typed, whole_number
from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, admin_form, viewer_of
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.services import services_of
from river_gateway.tenancy import accounts, money

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from river_client.wire import Price
    from river_gateway.dashboard.viewer import Viewer

_PAGE = Page("prices.html")
_PATH = f"{PATH}/prices"
_HISTORY_SHOWN = 200
KINDS: tuple[str, ...] = get_args(PricedKind)
_REFUSED = (InvalidFieldError, NotFoundError, ConflictError)
_STORED_HOURS = 720
_EXAMPLES = {
    "tokens": (
        (1_000, "A request of 1,000 tokens"),
        (10**6, "A million tokens"),
        (10**9, "A billion tokens"),
    ),
    "storage": (
        (KILOBYTES_PER_GIGABYTE * 24 // 10, "A checkpoint of 100 MB for a day"),
        (KILOBYTES_PER_GIGABYTE * _STORED_HOURS, "A GB for a month of 720 hours"),
        (1_000 * KILOBYTES_PER_GIGABYTE * _STORED_HOURS, "A TB for a month of 720 hours"),
    ),
}


@dataclass(frozen=True, slots=True)
class Current:
    """What a model, tier and kind cost now (None: not yet) and from the next planned change on, if there is one."""

    model: str
    context_length: int
    kind: str
    now: Price | None
    then: Price | None


@dataclass(frozen=True, slots=True)
class Example:
    """What something costs at the price in force (None: there is none) and at one that is thought of, nano-dollars."""

    what: str
    now_nano_usd: int | None
    then_nano_usd: int


# ---- Looking ---------------------------------------------------------------------------------------------------------


@get("/prices", include_in_schema=False)
async def prices_page(request: Request[Any, Any, Any]) -> Response[str]:
    """Prices in force, planned and past, of all models or the one in the address, and discounts."""
    return await _show(request, await viewer_of(request))


async def _show(
    request: Request[Any, Any, Any],
    viewer: Viewer,
    *,
    price: Typed | None = None,
    discount: Typed | None = None,
    examples: Sequence[Example] = (),
) -> Response[str]:
    pool, now = services_of(request).pool, datetime.now(UTC)
    async with pool.acquire() as connection:
        known = await list_prices(connection)
        granted = await list_discounts(connection, viewer.tenant_id)
    model = request.query_params.get("model", "")
    shown = [one for one in known if not model or one.model == model]
    past = [one for one in shown if one.valid_to is not None and _moment(one.valid_to) <= now]
    tenants = await accounts.list_tenants(pool) if viewer.is_admin else []
    price, discount = price or Typed({"model": model} if model else {}), discount or Typed()
    values = {
        "current": current_prices(shown, now),
        "past": sorted(past, key=lambda one: one.valid_to or "", reverse=True)[:_HISTORY_SHOWN],
        "past_count": len(past),
        "models": sorted({one.model for one in known}),
        "model": model,
        "kinds": [(kind, kind.replace("_", " ")) for kind in KINDS],
        "discounts": granted,
        "tenants": tenants,
        "names": {tenant.tenant_id: tenant.name for tenant in tenants},
        "price": price,
        "discount": discount,
        "examples": examples,
    }
    refused = price.error is not None or discount.error is not None
    return show(_PAGE, request, viewer, values, status=422 if refused else 200)


def current_prices(known: Sequence[Price], now: datetime) -> list[Current]:
    """By model, tier and kind, what is in force and what is planned next."""
    found: dict[tuple[str, int, str], Current] = {}
    for one in known:  # Oldest first.
        if one.valid_to is not None and _moment(one.valid_to) <= now:
            continue
        key = (one.model, one.context_length, one.kind)
        before = found.get(key)
        if _moment(one.valid_from) <= now:
            found[key] = Current(*key, now=one, then=None)
        elif before is None or before.then is None:
            found[key] = Current(*key, now=before.now if before else None, then=one)
    return list(found.values())


# ---- Setting ---------------------------------------------------------------------------------------------------------


@post("/prices", include_in_schema=False, status_code=200)
async def set_price(request: Request[Any, Any, Any]) -> Response[Any]:
    """Puts a price in force, or with `step=preview` shows what things would cost with it."""
    viewer, form = await admin_form(request)
    try:
        asked = _price_asked(form)
        if form.get("step") == "preview":
            money.check_price(asked)
            examples = await _examples(request, asked)
            return await _show(request, viewer, price=Typed(form), examples=examples)
        await money.set_price(services_of(request), actor_of(request, viewer), asked)
    except _REFUSED as error:
        return await _show(request, viewer, price=Typed(form, error))
    return redirect(_PATH)


@post("/discounts", include_in_schema=False, status_code=200)
async def set_discount(request: Request[Any, Any, Any]) -> Response[Any]:
    """Puts a tenant's discount in force; 0 percent ends what there was."""
    viewer, form = await admin_form(request)
    try:
        asked = SetDiscount(
            tenant=form.get("tenant", ""),
            percent=form.get("percent", "").strip(),
            model=form.get("model", "").strip() or "*",
            kind=cast("Any", _one_of((ANY_KIND, *KINDS), form.get("kind", ""))),
            valid_from=moment_typed(form.get("valid_from", "")),
        )
        await money.set_discount(services_of(request), actor_of(request, viewer), asked)
    except _REFUSED as error:
        return await _show(request, viewer, discount=Typed(form, error))
    return redirect(f"{_PATH}#discounts")


def _price_asked(form: Mapping[str, str]) -> SetPrice:
    return SetPrice(
        model=form.get("model", "").strip(),
        context_length=whole_number(form.get("context_length", ""), "context_length") or 0,
        kind=cast("PricedKind", _one_of(KINDS, form.get("kind", ""))),
        usd_per_million=form.get("usd_per_million", "").strip(),
        valid_from=moment_typed(form.get("valid_from", "")),
    )


def _one_of(choices: Sequence[str], text: str) -> str:
    if text not in choices:
        raise InvalidFieldError(
            f"kind: {text[:50]!r} is none of {', '.join(choices)}", param="kind"
        )
    return text


async def _examples(request: Request[Any, Any, Any], asked: SetPrice) -> list[Example]:
    """What things cost now, where the same model, tier and kind has a price, and would cost."""
    async with services_of(request).pool.acquire() as connection:
        known = await list_prices(connection)
    now: Decimal | None = None
    for one in current_prices(known, datetime.now(UTC)):
        same = (one.model, one.context_length, one.kind) == (
            asked.model,
            asked.context_length,
            asked.kind,
        )
        if same and one.now is not None:
            now = per_unit(UsageKind(one.kind), Decimal(one.now.usd_per_million))
    then = per_unit(UsageKind(asked.kind), Decimal(asked.usd_per_million))
    return [
        Example(what, None if now is None else round(now * units), round(then * units))
        for units, what in _EXAMPLES["storage" if asked.kind == "storage" else "tokens"]
    ]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


PRICE_PAGES: list[Any] = [prices_page, set_price, set_discount]
