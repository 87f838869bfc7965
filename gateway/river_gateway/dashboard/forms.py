"""What people type into the dashboard's forms, as the API takes it; and a form that is shown again with what is wrong.

A form is answered by the page that it is on. Where a field is refused, by the same rules and in the same words as over
the API, the page comes back with what was typed and the sentence beside the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from river_billing.limits import NUMBER_MAX_CHARS
from river_gateway.dashboard.words import NANO_USD_PER_USD
from river_gateway.errors import GatewayError, InvalidFieldError
from river_gateway.tenancy.money import parse_number


@dataclass(frozen=True, slots=True)
class Typed:
    """What a form had when it was refused, and why; a form that is shown first has neither."""

    values: Mapping[str, str] = field(default_factory=dict[str, str])
    error: GatewayError | None = None

    def value(self, name: str, otherwise: object = None) -> str:
        """What a field shows: what was typed, else what is."""
        if name in self.values:
            return self.values[name]
        return "" if otherwise is None else str(otherwise)

    def problem(self, name: str) -> str | None:
        """What is wrong with a field, `scopes[1]` being one of `scopes`."""
        if self.error is None or self.error.param is None:
            return None
        return self.error.message if self.error.param.partition("[")[0] == name else None

    @property
    def elsewhere(self) -> str | None:
        """What is wrong and with no field."""
        if self.error is None or self.error.param is not None:
            return None
        return self.error.message


def whole_number(text: str, param: str) -> int | None:
    """A number that is typed; nothing is None.

    Raises:
        InvalidFieldError: it is none.
    """
    text = text.strip()
    if not text:
        return None
    digits = text.replace(",", "")
    if not digits.isdecimal() or not digits.isascii() or len(digits) > NUMBER_MAX_CHARS:
        raise InvalidFieldError(f"{param}: {text[:50]!r} is no whole number", param=param)
    return int(digits)


def nano_usd(text: str, param: str) -> int | None:
    """Dollars that are typed, in nano-dollars; nothing is None.

    Raises:
        InvalidFieldError: it is no number, or finer than a nano-dollar.
    """
    text = text.strip()
    if not text:
        return None
    amount: Decimal = parse_number(text, param) * NANO_USD_PER_USD
    if amount != round(amount):
        raise InvalidFieldError(f"{param}: {text!r} is finer than a nano-dollar", param=param)
    return int(amount)


def moment_typed(text: str) -> str | None:
    """The time of an input of `datetime-local` or `date`, which are meant in UTC; nothing is None."""
    text = text.strip()
    if not text:
        return None
    return f"{text}T00:00:00+00:00" if "T" not in text else f"{text}+00:00"
