"""The price card, and how prices are read and changed.

A price is in force for a model, a tier of context length and a kind during [valid_from, valid_to).
Its row never changes, except that an open one may be closed; what was charged keeps pointing at the
row it was charged with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from river_billing import limits
from river_billing.database import REFUSALS, Connection
from river_billing.errors import PriceError
from river_billing.events import UsageKind
from river_client.wire import Price

NANO_USD_PER_USD = 10**9
TOKENS_PER_PRICE = 10**6  # card prices are per million tokens
CACHED_PROMPT_SHARE = Decimal("0.2")

# Storage is counted in kilobyte-hours (1,000 bytes for an hour): whole numbers for all sizes.
KILOBYTES_PER_GIGABYTE = 10**6
HOURS_PER_MONTH = 720
STORAGE_USD_PER_GB_MONTH = Decimal("0.10")

ANY_MODEL = "*"
ANY_CONTEXT_LENGTH = 1
CARD_VALID_FROM = datetime(2020, 1, 1, tzinfo=UTC)

_UNIT_DIGITS = Decimal("1e-9")  # of the column numeric(20,9)
_USD_DIGITS = 12
_USD_MAX = limits.PRICE_MAX_NANO_USD * TOKENS_PER_PRICE // NANO_USD_PER_USD


@dataclass(frozen=True, slots=True)
class CardLine:
    """Dollars per million tokens of a model, for contexts up to `context_length`."""

    model: str
    context_length: int
    prompt: Decimal
    completion: Decimal
    training: Decimal


def _line(model: str, context_length: int, prompt: str, completion: str, training: str) -> CardLine:
    return CardLine(model, context_length, Decimal(prompt), Decimal(completion), Decimal(training))


PRICE_CARD = (
    _line("Qwen3.6-35B-A3B-FP8", 262_144, "0.33", "0.82", "1"),
    _line("Qwen3.5-397B-A17B-FP8", 65_536, "1.66", "4.15", "5"),
    _line("Qwen3.5-397B-A17B-FP8", 262_144, "3.32", "8.30", "10"),
    _line("Kimi-K2.6-NVFP4", 32_768, "1.22", "3.06", "3.67"),
    _line("Kimi-K2.6-NVFP4", 131_072, "4.28", "10.70", "12.84"),
    _line("GLM-5.1-NVFP4", 32_768, "2.45", "6.12", "7.34"),
    _line("GLM-5.1-NVFP4", 131_072, "8.56", "21.40", "25.68"),
    _line("river/tiny-moe", 1_024, "0.01", "0.03", "0.05"),
)

_SEED = """
insert into price (model, context_length, kind, nano_usd_per_unit, valid_from)
select $1, $2, $3, $4, $5
where not exists (select from price where model = $1 and context_length = $2 and kind = $3)
"""

_CLOSE = """
update price set valid_to = coalesce($4, now())
where model = $1 and context_length = $2 and kind = $3 and valid_to is null
"""

_OPEN = """
insert into price (model, context_length, kind, nano_usd_per_unit, valid_from)
values ($1, $2, $3, $4, coalesce($5, now()))
"""

_LIST = "select * from price order by model, context_length, kind, valid_from"


async def seed_prices(connection: Connection) -> None:
    """Adds the prices of the card that the table has never had, and leaves changed ones alone."""
    async with connection.transaction():
        # Recorders that start together would both find a price missing.
        await connection.execute("lock table price in share row exclusive mode")
        for model, context_length, kind, nano_usd_per_unit in card_prices():
            await connection.execute(
                _SEED, model, context_length, kind.value, nano_usd_per_unit, CARD_VALID_FROM
            )


async def set_price(
    connection: Connection,
    *,
    model: str,
    context_length: int,
    kind: UsageKind,
    nano_usd_per_unit: Decimal,
    valid_from: datetime | None = None,
) -> None:
    """Puts a price in force from `valid_from` (None: now) and ends the one before it.

    Raises:
        PriceError: it is out of range, or `valid_from` lies before now or a planned change.
    """
    check_not_past(valid_from)
    tier = (model, context_length, kind.value)
    try:
        async with connection.transaction():
            await connection.execute(_CLOSE, *tier, valid_from)
            await connection.execute(_OPEN, *tier, nano_usd_per_unit, valid_from)
    except REFUSALS as error:
        raise PriceError(f"valid_from: {error}") from error


def check_not_past(valid_from: datetime | None) -> None:
    """Raises PriceError if a change would reach into the past."""
    if valid_from is not None and valid_from < datetime.now(UTC):
        raise PriceError(f"valid_from: {valid_from.isoformat()} is over")


async def list_prices(connection: Connection) -> list[Price]:
    """Every price there is or was."""
    return [
        Price(
            model=row["model"],
            context_length=row["context_length"],
            kind=row["kind"],
            usd_per_million=shown_price(UsageKind(row["kind"]), row["nano_usd_per_unit"]),
            valid_from=row["valid_from"].isoformat(),
            valid_to=row["valid_to"].isoformat() if row["valid_to"] else None,
        )
        for row in await connection.fetch(_LIST)
    ]


def card_prices() -> Iterator[tuple[str, int, UsageKind, Decimal]]:
    """The card as rows: model, tier, kind, nano-dollars per unit."""
    for line in PRICE_CARD:
        dollars = {
            UsageKind.PROMPT: line.prompt,
            UsageKind.CACHED_PROMPT: line.prompt * CACHED_PROMPT_SHARE,
            UsageKind.COMPLETION: line.completion,
            UsageKind.TRAINING: line.training,
        }
        for kind, usd_per_million in dollars.items():
            yield line.model, line.context_length, kind, per_token(usd_per_million)
    yield (
        ANY_MODEL,
        ANY_CONTEXT_LENGTH,
        UsageKind.STORAGE,
        per_kilobyte_hour(STORAGE_USD_PER_GB_MONTH),
    )


def per_unit(kind: UsageKind, usd: Decimal) -> Decimal:
    """Nano-dollars per unit, from dollars as people quote them: see `shown_price`.

    Raises:
        PriceError: it is negative, too high, or has more places than a price can have.
    """
    if not 0 <= usd <= _USD_MAX:
        raise PriceError(f"usd_per_million: {usd}, must be 0 to {_USD_MAX}")
    if kind == UsageKind.STORAGE:
        return per_kilobyte_hour(usd)
    if usd != round(usd, _USD_DIGITS):
        raise PriceError(f"usd_per_million: {usd} has more than {_USD_DIGITS} places")
    return per_token(usd)


def per_token(usd_per_million: Decimal) -> Decimal:
    """Nano-dollars per token."""
    return (usd_per_million * NANO_USD_PER_USD / TOKENS_PER_PRICE).quantize(_UNIT_DIGITS)


def per_kilobyte_hour(usd_per_gb_month: Decimal) -> Decimal:
    """Nano-dollars per kilobyte-hour."""
    nano_usd = usd_per_gb_month * NANO_USD_PER_USD
    return (nano_usd / (KILOBYTES_PER_GIGABYTE * HOURS_PER_MONTH)).quantize(_UNIT_DIGITS)


def shown_price(kind: UsageKind, nano_usd_per_unit: Decimal) -> str:
    """Dollars as people quote them: per million tokens, or per GB and month."""
    units = (
        KILOBYTES_PER_GIGABYTE * HOURS_PER_MONTH if kind == UsageKind.STORAGE else TOKENS_PER_PRICE
    )
    dollars = nano_usd_per_unit * units / NANO_USD_PER_USD
    # A price of storage was rounded to its unit; one of tokens is exact.
    places = Decimal("1e-6") if kind == UsageKind.STORAGE else Decimal("1e-12")
    return f"{dollars.quantize(places).normalize():f}"
